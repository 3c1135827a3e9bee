"""Memory that a training step needs beyond parameters, optimiser state and its batch.

    python -m benchmarks.memory IMAGES GAUSSIANS

measures one step of the hierarchy with networks of 3 × 128 at 128 px and prints bytes and seconds as JSON.
`benchmarks.step` calls it for several sizes, each in a process of its own, and fits

    bytes = start + a · Gaussians + b · images · Gaussians

(features and weights' gradients go with the second term, positions and what is kept for the backward pass with the third).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
import typer

from benchmarks.machine import use_threads
from benchmarks.tables import table
from spire_dist.config import HierarchyConfig, RunConfig
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.order import Order
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.latent_table import LatentTable, at_home
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture, Mixture
from spire_dist.physics.poses import random_rotations
from spire_dist.progress import progress
from spire_dist.schema import MOST_IMAGES_PER_CHUNK
from spire_dist.training.engines import DataParallel
from spire_dist.training.trainer import Trainee, build_trainee, learn, training_order

BOX, RADIUS_PX = 128, 40.0
SIZES = ((8, 8192), (8, 32768), (32, 8192), (32, 32768))
QUICK_SIZES = ((2, 512), (2, 1024), (4, 512), (4, 1024))
FULL_SIZE = (64, 65536)
"""(images, Gaussians)."""
TARGET_BYTES = 1e9
FREE_SHARE, LONGEST_S = 0.7, 120.0
"""The full size runs where it should take no more than this share of the free memory, and no longer than this."""


def main(images: int, gaussians: int, threads: int = 0) -> None:
    """Measure one size in this process; print it as JSON."""
    use_threads(threads)
    training_step(2, 64)()  # compiles, starts threads
    step = training_step(images, gaussians)
    start = time.perf_counter()
    rise = peak_rise(step)
    print(json.dumps({"images": images, "gaussians": gaussians, "bytes": rise, "s": time.perf_counter() - start}))


def peak_rise(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory rises, at its highest, while `work` runs. Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _memory_status("VmRSS")
    work()
    return _memory_status("VmHWM") - before


def _memory_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def make_trainee(
    config: RunConfig, stage: int, particles: int, device: torch.device | str = "cpu", width_px: float = 1.5
) -> Trainee:
    """The model, latents and optimisers of a stage, its Gaussians made up: a cloud that fits into `BOX`, all of one width."""
    settings = config.stage1 if stage == 1 else config.stage2
    count, dimension = settings.gaussians, config.latent.dimension
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    spread = RADIUS_PX / (2 if stage == 1 else 4)  # about the centre of the box, or about an anchor
    own = Gaussians(spread * normal(count, 3), torch.full((count,), width_px), normal(count, config.features))
    if stage == 1:
        mixture: Mixture = CoarseMixture(own, dimension, config.stage1)
    else:
        anchors = config.parts.anchors
        centres, features = RADIUS_PX / 2 * normal(anchors, 3), normal(anchors, config.features)
        anchor_of = torch.arange(count) * anchors // count
        mixture = HierarchicalMixture(own, anchor_of, centres, features, dimension, config.stage2)
    return begin_trainee(stage, mixture.to(device), normal(particles, dimension), config, torch.device(device))


def begin_trainee(
    stage: int,
    mixture: Mixture,
    latents: torch.Tensor,
    config: RunConfig,
    device: torch.device,
    source: BatchSource | None = None,
) -> Trainee:
    """A stage that starts from a mixture and free latents [N, L], in one process alone; of no particles without a source."""
    batch = (config.stage1 if stage == 1 else config.stage2).batch
    order = Order(len(latents), MOST_IMAGES_PER_CHUNK, batch, config.seed + stage)
    order = order if source is None else training_order(source, config, stage)
    table = LatentTable(at_home(latents), order, Mesh(), device)
    return build_trainee(stage, mixture, table, config, len(latents), Mesh())


def training_step(images: int, gaussians: int) -> Callable[[], None]:
    """Loss, gradients and optimisers on synthetic particles; all that it needs is allocated before it is called."""
    config = RunConfig(stage2=HierarchyConfig(gaussians=gaussians, layers=3, hidden=128, tries=0))
    trainee = make_trainee(config, 2, images)
    engine = trainee.engine
    assert isinstance(engine, DataParallel)
    for parameter in trainee.mixture.parameters():  # one step along zero makes the optimiser's state
        parameter.grad = torch.zeros_like(parameter)
    engine.optimiser.step()
    engine.optimiser.zero_grad()
    rotations = torch.from_numpy(random_rotations(images, seed=0).astype(np.float32))
    observed, ctf = torch.fft.rfft2(torch.randn(images, BOX, BOX)), torch.ones(images, BOX, BOX // 2 + 1)
    batch = Batch(torch.arange(images), observed, ctf, rotations, torch.zeros(images, 2), total=images)

    assert trainee.table is not None
    trainee.table.visit(0)

    def step() -> None:
        learn(trainee, batch, config, 1.0, False)

    return step


def measure(sizes: tuple[tuple[int, int], ...], threads: int, full: bool) -> dict:
    """Every size; the formula through them and what it says of the full size; and that itself, where it fits."""
    rows = [_in_process(size, threads) for size in progress(sizes, "memory", unit="size")]
    terms = np.array([_terms(row["images"], row["gaussians"]) for row in rows])
    formula = np.linalg.lstsq(terms, np.array([row["bytes"] for row in rows]))[0]
    seconds = rows[-1]["s"] * _terms(*FULL_SIZE)[2] / terms[-1, 2]
    predicted = {"bytes": float(formula @ _terms(*FULL_SIZE)), "s": float(seconds)}
    fits = predicted["bytes"] < FREE_SHARE * psutil.virtual_memory().available and predicted["s"] < LONGEST_S
    return {
        "box": BOX,
        "sizes": rows,
        "formula": formula.tolist(),
        "full_predicted": predicted,
        "full_measured": _in_process(FULL_SIZE, threads) if full and fits else None,
    }


def _terms(images: int, gaussians: int) -> tuple[float, float, float]:
    return 1.0, float(gaussians), float(images * gaussians)


def _in_process(size: tuple[int, int], threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, size), "--threads", str(threads)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def lines(result: dict) -> Iterator[str]:
    """The result as text: the full size first."""
    full = f"{FULL_SIZE[0]} × {FULL_SIZE[1]:,}"
    predicted, measured = result["full_predicted"], result["full_measured"]

    def row(name: str, values: dict) -> tuple[str, ...]:
        return name, f"{values['bytes'] / TARGET_BYTES:.2f}", f"{values['bytes'] / 1e6:,.0f} MB", f"{values['s']:.1f} s"

    rows = [row(f"{full}, measured", measured)] if measured else []
    rows.append(row(f"{full}, by the formula", predicted))
    rows += [row(f"{r['images']} × {r['gaussians']:,}, measured", r) for r in result["sizes"]]
    yield "## Memory of a training step"
    yield ""
    yield from table(("images × Gaussians", "of 1 GB", "memory", "time of the step"), rows)
    yield ""
    start, per_gaussian, per_pair = result["formula"]
    yield (
        f"Formula: {round(start / 1e6)} MB + {per_gaussian:,.0f} bytes per Gaussian + {per_pair:,.0f} per (image, Gaussian). "
        f"One training step of the hierarchy, networks 3 × 128, {result['box']} px, each size in a process of its own: the "
        "rise of resident memory at its highest above parameters, optimiser state and batch."
    )
    if not measured:
        yield f"{full} was not measured: left out by --quick, or above the free memory or {LONGEST_S:.0f} s by the formula."


if __name__ == "__main__":
    typer.run(main)
