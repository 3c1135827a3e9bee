"""What ranks cost and save: bytes on the wire, time in collectives, memory, a million Gaussians, DDP beside DeepSpeed.

    python -m benchmarks.ranks OUT

All on one machine over gloo, one thread per rank. Bytes are those that pass the loopback device while the steps run, which
nothing else should use meanwhile; the formula is that of docs/parallel.md. Times of more ranks than cores are not shown.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import typer

from benchmarks.machine import describe_machine, machine_line
from benchmarks.tables import table, write
from spire_dist.config import HierarchyConfig, ParallelConfig, RunConfig
from spire_dist.data.loader import Batch
from spire_dist.data.order import NOTHING, Order
from spire_dist.distributed.mesh import LAUNCH_VARIABLES, Mesh, init_distributed
from spire_dist.distributed.pulse import WAITING
from spire_dist.machine import cores
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.latent_table import LatentTable, at_home
from spire_dist.model.mixtures import HierarchicalMixture
from spire_dist.model.sharing import own_share
from spire_dist.physics.poses import random_rotations
from spire_dist.progress import progress
from spire_dist.training.engines import DataParallel
from spire_dist.training.trainer import Trainee, agree, build_trainee, learn

CPU = torch.device("cpu")
FEATURES, LATENT, ANCHORS, CHUNK = 24, 4, 8, 64
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A step of `images` images in all, shared by replicate × gauss ranks."""

    replicate: int
    gauss: int
    gaussians: int
    images: int
    box: int
    steps: int

    @property
    def world(self) -> int:
        """Ranks."""
        return self.replicate * self.gauss


SIZES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
TRAFFIC = [Case(*size, 4096, 64, 64, 20) for size in SIZES]
SPEED = [Case(*size, 8192, 64, 128, 20) for size in SIZES[:3]]
MILLION = [Case(*size, 1_000_000, 8, 128, 3) for size in SIZES[:3]]


def main(out: Annotated[Path, typer.Argument(help="Folder for results.")]) -> None:
    """Measure, print tables, write JSON and Markdown."""
    result: dict[str, Any] = {"machine": describe_machine(1)}
    for name, cases in (("traffic", TRAFFIC), ("speed", SPEED), ("million", MILLION)):
        result[name] = [asdict(case) | measure(case) for case in progress(cases, name, unit="case")]
    result["engines"] = engines(out)
    text = lines(result)
    print("\n".join(("", *text)))
    write(out, "ranks", result, text)


# ---- steps on made-up particles


def measure(case: Case) -> dict[str, Any]:
    """Seconds per step, share of collectives, bytes sent per rank and step, memory of a rank's Gaussians."""
    found = on_ranks(case.world, _rank, case)
    first = found[0]
    return {
        "seconds": first["seconds"],
        "collective_share": float(np.mean([row["collective_share"] for row in found])),
        "bytes": first["wire_bytes"] / case.world,
        "formula": sum(traffic(case, first["common"]).values()),
        "gaussian_bytes": max(row["gaussian_bytes"] for row in found),
        "gib": max(row["gib"] for row in found),
    }


def traffic(case: Case, common: int) -> dict[str, float]:
    """Bytes that docs/parallel.md says a rank sends in a step, where all ranks have `common` parameters."""
    replicate, gauss, world = case.replicate, case.gauss, case.world
    own = case.images / world
    return {
        "images": 2 * (gauss - 1) * own * 4 * case.box**2,
        "latents": (gauss - 1) * own * 4 * (2 * LATENT + 11),
        "gaussians": 2 * (replicate - 1) / replicate * 4 * case.gaussians * (FEATURES + 5) / gauss,
        "networks": 2 * (world - 1) / world * 4 * common,
    }


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in `world` new processes of one thread that can meet as ranks, rank by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_placed, args=(rank, world, port, results, work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]


def _placed(rank: int, world: int, port: int, results: Any, work: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= dict(zip(LAUNCH_VARIABLES, map(str, (rank, world, rank, "localhost", port)), strict=True))
    torch.set_num_threads(1)
    import numba

    numba.set_num_threads(1)
    results.put((rank, work(*arguments)))


def _rank(case: Case) -> dict[str, Any]:
    with init_distributed(case.gauss, "cpu", timeout_s=300) as mesh:
        trainee, batch, config = _begun(case, mesh)

        def step() -> None:
            agree(learn(trainee, batch, config, 1.0, False), [False] * 3, mesh)

        for _ in range(WARM_UP):
            step()
        if mesh.world > 1:
            dist.barrier()
        sent, waited, start = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, WAITING.seconds, time.perf_counter()
        for _ in range(case.steps):
            step()
        if mesh.world > 1:
            dist.barrier()
        seconds = (time.perf_counter() - start) / case.steps
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent
        assert isinstance(trainee.engine, DataParallel)
        optimiser = trainee.engine.optimiser
        own = list(trainee.engine.gaussians.values())
        tensors = [t for p in own for t in (p, p.grad, *optimiser.state[p].values()) if isinstance(t, torch.Tensor)]
        return {
            "seconds": seconds, "wire_bytes": sent / case.steps,
            "collective_share": (WAITING.seconds - waited) / case.steps / seconds,
            "common": sum(p.numel() for p in trainee.engine.common.values()),
            "gaussian_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "gib": psutil.Process().memory_info().rss / 2**30,
        }  # fmt: skip


def _begun(case: Case, mesh: Mesh) -> tuple[Trainee, Batch, RunConfig]:
    settings = HierarchyConfig(gaussians=case.gaussians, batch=case.images, layers=1, hidden=32, tries=0)
    config = RunConfig(stage2=settings, parallel=ParallelConfig(gauss=case.gauss))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count = case.gaussians
    own = Gaussians(case.box / 12 * normal(count, 3), torch.full((count,), 1.5), normal(count, FEATURES))
    anchor_of = torch.arange(count) * ANCHORS // count
    centres, features = case.box / 6 * normal(ANCHORS, 3), normal(ANCHORS, FEATURES)
    mixture = own_share(HierarchicalMixture(own, anchor_of, centres, features, LATENT, settings), mesh)
    order = Order(case.images, CHUNK, case.images, config.seed + 2)
    run = -(-case.images // mesh.world)
    home = at_home(normal(case.images, LATENT)[mesh.rank * run : (mesh.rank + 1) * run])
    trainee = build_trainee(2, mixture, LatentTable(home, order, mesh, CPU), config, case.images, mesh)
    rows = order.rows(0, mesh.rank, mesh.world)
    rows = torch.from_numpy(rows[rows != NOTHING])
    images = torch.fft.rfft2(torch.randn(len(rows), case.box, case.box))
    rotations = torch.from_numpy(random_rotations(len(rows), seed=mesh.rank).astype(np.float32))
    ctf, shifts = torch.ones(images.shape), torch.zeros(len(rows), 2)
    return trainee, Batch(rows, images, ctf, rotations, shifts, total=case.images), config


# ---- DDP beside DeepSpeed, on particles

ENGINES = ["ddp", *(f"deepspeed ZeRO-{zero}" for zero in range(4))]
STEPS = 100


def engines(out: Path) -> list[dict[str, Any]]:
    """100 steps of stage 1 by each engine on two ranks: the losses of every step, time and memory."""
    store = out / "store"
    if not store.exists():
        data = out / "data"
        _command("simulate", str(data), "--particles", "2000", "--box", "64", "--seed", "0")
        _command("prep", str(data / "particles.star"), str(store))
    rows = []
    for name in progress(ENGINES, "engines"):
        run = out / "engines" / name.replace(" ", "-").lower()
        engine, _, zero = name.partition(" ZeRO-")
        settings = {
            "data.store": f"'{store.absolute()}'", "threads": 1, "stage1.gaussians": 2048, "stage1.epochs": STEPS * 64 / 2000,
            "stage2.gaussians": 256, "stage2.epochs": 0.04, "output.log_seconds": 1e-9, "parallel.engine": f"'{engine}'",
            "parallel.zero": zero or 0,
        }  # fmt: skip
        if not (run / "latents.npy").exists():
            options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            _command("train", "--run", str(run), "--processes", "2", "--restarts", "0", *options)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        stage = [record for record in records if record["stage"] == 1][:STEPS]
        later = stage[10:]  # the first ones compile
        seconds = (later[-1]["elapsed_s"] - later[0]["elapsed_s"]) / (len(later) - 1)
        losses = [record["loss"] for record in stage]
        rows.append({"name": name, "losses": losses, "seconds": seconds, "gib": stage[-1]["memory_gib"]})
    return rows


def _command(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "spire_dist.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"spire-dist {' '.join(words)}: {done.stderr[-2000:]}")


# ---- text


def lines(result: dict[str, Any]) -> list[str]:
    """The result as Markdown that also reads well in a terminal."""
    text = ["## Ranks", "", machine_line(result["machine"]), ""]
    text += ["Bytes sent per rank and step, 4,096 Gaussians, 64 images of 64 px:", ""]
    rows = [[_mesh(row), f"{row['bytes'] / 1e6:.3f} MB", f"{row['formula'] / 1e6:.3f} MB",
             f"{row['bytes'] / row['formula']:.3f}" if row["formula"] else "",
             f"{row['gaussian_bytes'] / 1e6:.2f} MB"] for row in result["traffic"]]  # fmt: skip
    text += table(["replicate × gauss", "on the wire", "formula", "ratio", "Gaussians of a rank"], rows)
    for key, what in (
        ("speed", "8,192 Gaussians, 64 images of 128 px"),
        ("million", "1,000,000 Gaussians, 8 images of 128 px"),
    ):
        alone = result[key][0]
        text += ["", f"A step of {what}, one thread per rank:", ""]
        rows = [[_mesh(row), f"{row['seconds']:.3f} s", f"{alone['seconds'] / row['seconds']:.2f}",
                 f"{alone['seconds'] / row['seconds'] / row['replicate'] / row['gauss']:.2f}",
                 f"{row['collective_share']:.0%}", f"{row['gaussian_bytes'] / 1e6:.0f} MB", f"{row['gib']:.2f} GiB"]
                for row in result[key] if row["replicate"] * row["gauss"] <= cores()]  # fmt: skip
        text += table(["ranks", "step", "times one", "efficiency", "in collectives", "Gaussians", "process"], rows)
    first = np.array(result["engines"][0]["losses"])
    text += ["", f"{STEPS} steps of stage 1 on two ranks, 2,048 Gaussians, 64 images of 64 px:", ""]
    rows = [[row["name"], f"{np.max(np.abs(np.array(row['losses']) / first - 1)):.1e}", f"{1e3 * row['seconds']:.1f} ms",
             f"{row['gib']:.2f} GiB"] for row in result["engines"]]  # fmt: skip
    return text + list(table(["engine", "losses, farthest from ddp's", "step", "process"], rows))


def _mesh(row: dict[str, Any]) -> str:
    return f"{row['replicate']} × {row['gauss']}"


if __name__ == "__main__":
    typer.run(main)
