"""Whole training steps of the `cryobench` preset on a GPU, beside their targets, and where their time goes.

    python -m benchmarks.gpu_steps OUT [--device cuda|cpu] [--quick]

Steps are `train_stage` itself on made-up particles and Gaussians of the preset's sizes, by every backend of the projector
that the device has. Its batches lie on the device, so that the step alone is timed; further rows have them made, as in a
user's run, by the data thread from particles in memory, of the node and of the GPU. Methods take turns within a round;
medians. Last, operators of the device by their share of its time (torch.profiler), and how long the device works in a step:
what is missing there is Python's.
OUT gets gpu_steps.json and gpu_steps.md. `--device cpu` is there to try the program, not to measure.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, cast

import numpy as np
import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import describe_gpu
from benchmarks.machine import describe_machine, machine_line
from benchmarks.memory import BOX, begin_trainee, make_trainee
from benchmarks.step import take_turns, train_epochs
from benchmarks.tables import table, write
from spire_dist.config import RatesConfig, RunConfig, load_config
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.physics.poses import random_rotations
from spire_dist.physics.projector import Backend
from spire_dist.schema import CTF_COLUMNS, MOST_IMAGES_PER_CHUNK
from spire_dist.training.train import use_threads
from spire_dist.training.trainer import Trainee

TARGETS = {1: 20_000, 2: 8_000}
"""Images/s of each stage on one H100."""
LARGER = (256, 1024)
"""Images of a step, beside the preset's."""
PARTICLES, ROUNDS, STEPS = 4096, 5, 10
"""A round goes over all particles, so often that there are this many steps at least."""
WIDTHS_PX = {1: 2.4, 2: 1.5}
"""Of all Gaussians: four times as many fill the same molecule when they are narrower by the cube root of four."""
CTF_ROW = {
    "voltage_kv": 300.0,
    "cs_mm": 2.7,
    "amplitude_contrast": 0.1,
    "defocus_u_a": 15e3,
    "defocus_v_a": 14e3,
    "scale": 1,
}
"""Of every particle; the other columns are zero."""
KERNELS = 15


class OnDevice:
    """What `train_stage` reads of a batch source; every batch is the same and lies on the device."""

    def __init__(self, batch: Batch, particles: int) -> None:
        self.store = SimpleNamespace(count=particles)
        self._batch = batch

    def order(self, batch: int, seed: int) -> Order:
        """Of which only the number of steps is asked."""
        return Order(self.store.count, MOST_IMAGES_PER_CHUNK, batch, seed)

    def training(self, order: Order, first_step: int, rank: int, world: int) -> Iterator[Batch]:
        """The batch, again and again."""
        return (self._batch for _ in count())


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the results.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Few and small steps: a look, not a measurement.")] = False,
) -> None:
    """Time the steps of both stages, weigh and profile them; print tables, write JSON and Markdown."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        raise typer.Exit(2)
    config = settle(load_config(None, "cryobench"), quick)
    machine = describe_machine(use_threads(config, BOX, torch.device(device)))
    sources = make_sources(16 if quick else PARTICLES, torch.device(device))
    work = partial(measure, config, sources, torch.device(device), (8,) if quick else LARGER, 1 if quick else ROUNDS)
    gpu = describe_gpu() if device == "cuda" else None
    result = {"machine": machine, "gpu": gpu, "stages": [work(stage) for stage in TARGETS]}
    text = list(lines(result))
    print("\n".join(("", *text)))
    write(out, "gpu_steps", result, text)


def settle(config: RunConfig, quick: bool) -> RunConfig:
    """No warm-up, no tries, and step sizes so small that the Gaussians stay as wide and as far apart as they were made."""
    changes: dict = {
        "warmup_epochs": 0.0,
        "tries": 0,
        "rates": RatesConfig(**dict.fromkeys(RatesConfig.model_fields, 1e-9)),
    }
    if quick:
        changes |= {"gaussians": 128, "batch": 4}
    stages = {"stage1": config.stage1.model_copy(update=changes), "stage2": config.stage2.model_copy(update=changes)}
    return config.model_copy(update=stages)


def make_sources(particles: int, device: torch.device) -> dict[str, BatchSource]:
    """Particles of white noise at random poses, by whose memory they are in."""
    noise = np.random.default_rng(0).standard_normal((particles, BOX, BOX), dtype=np.float32).astype(np.float16)
    store = SimpleNamespace(
        count=particles, box=BOX, pixel_size=3.0, images_per_chunk=MOST_IMAGES_PER_CHUNK, scale=None,
        shifts=np.zeros((particles, 2), np.float32), rotations=random_rotations(particles, seed=0).astype(np.float32),
        ctf=np.tile(np.array([CTF_ROW.get(name, 0) for name in CTF_COLUMNS], np.float32), (particles, 1)),
    )  # fmt: skip
    places = {"the node": noise} | ({"the GPU": torch.from_numpy(noise).to(device)} if device.type == "cuda" else {})
    return {place: BatchSource(cast(ParticleStore, store), images, device) for place, images in places.items()}


# ---- measurements


def measure(
    config: RunConfig,
    sources: dict[str, BatchSource],
    device: torch.device,
    larger: tuple[int, ...],
    rounds: int,
    stage: int,
) -> dict:
    """Speeds and memory by images of a step and by backend, the dense reference and the data thread once; the profile."""
    source = next(iter(sources.values()))
    settings, particles = config.stage1 if stage == 1 else config.stage2, source.store.count
    trainee = make_trainee(config, stage, particles, device, WIDTHS_PX[stage])
    for name, parameter in trainee.mixture.named_parameters():
        if name.endswith("last.weight"):  # a multiplication by zeros takes less power, and a GPU is faster then
            torch.nn.init.normal_(parameter, std=0.02)
    backends: list[Backend] = ["triton", "triton-dense"] if device.type == "cuda" else ["numba"]
    cases, profiled = [], []
    for images in (settings.batch, *larger):
        on_device = cast(BatchSource, OnDevice(next(source.training(source.order(images, 0))), particles))
        epochs = math.ceil(STEPS * images / particles)
        go_on = partial(timed, trainee, config, images, epochs)
        ways = {f"{images} images, {name}": go_on(name, on_device) for name in backends}
        first = next(iter(ways))
        if images == settings.batch:
            ways[f"{images} images, torch"] = go_on("torch", on_device)
            for place, fed in sources.items():
                ways[f"{first}, fed from memory of {place}"] = go_on(backends[0], fed)
        memory = {name: peak_mib(run, device) for name, run in ways.items()}  # and warms up
        rates = take_turns(ways, rounds)
        cases += [{"name": n, "images": images, "images_per_s": rates[n], "peak_mib": memory[n]} for n in ways]
        profiled = profiled or kernels(ways[first], epochs * source.order(images, 0).steps_per_epoch, device)
    return {
        "stage": stage,
        "gaussians": settings.gaussians,
        "network": [settings.layers, settings.hidden],
        "width_px": WIDTHS_PX[stage],
        "target": TARGETS[stage],
        "cases": cases,
        "kernels": profiled,
    }


def timed(
    trainee: Trainee, config: RunConfig, images: int, epochs: int, backend: Backend, source: BatchSource
) -> Callable[[], float]:
    """What trains on with so many images in a step, and returns images/s."""
    stages = {name: getattr(config, name).model_copy(update={"batch": images}) for name in ("stage1", "stage2")}
    config = config.model_copy(update={**stages, "projector": backend})
    assert trainee.table is not None
    trainee.table.come_home()
    values, device = trainee.table.home[:, 0].clone(), trainee.table.here.device
    again = begin_trainee(trainee.stage, trainee.mixture, values, config, device, source)
    return partial(train_epochs, again, config, source, epochs)


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most memory of the device that tensors take while it runs; None of a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def kernels(run: Callable[[], object], steps: int, device: torch.device) -> list[dict]:
    """What the device did in a step, the longest first: name, calls and ms of a step, share. Of a CPU: torch's operators."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        run()
    found = [
        event
        for event in profiler.key_averages()
        if event.device_type.name == device.type.upper() and not event.is_user_annotation
    ]
    times = [1e-3 * (e.self_device_time_total if gpu else e.self_cpu_time_total) / steps for e in found]
    rows = [
        {"name": event.key, "calls": event.count / steps, "ms": ms, "share": ms / sum(times)}
        for event, ms in zip(found, times, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["ms"])


# ---- text


def lines(result: dict) -> Iterator[str]:
    """The result as Markdown that also reads well in a terminal, ratios first."""
    yield "## Training steps on a GPU"
    yield ""
    if result["gpu"]:
        yield ", ".join(f"{name} {value}" for name, value in result["gpu"].items())
        yield ""
    yield machine_line(result["machine"])
    for stage in result["stages"]:
        layers, hidden = stage["network"]
        yield ""
        yield (
            f"Stage {stage['stage']}: {stage['gaussians']:,} Gaussians {stage['width_px']:g} px wide, networks "
            f"{layers} × {hidden}, {BOX} px; target {stage['target']:,} images/s. Memory: all tensors of the device."
        )
        yield ""
        header = f"stage {stage['stage']}", "of target", "images/s", "over the rounds", "step", "memory"
        yield from table(header, (_row(case, stage["target"]) for case in stage["cases"]))
        yield ""
        yield from _kernel_lines(stage)


def _row(case: dict, target: int) -> tuple[str, ...]:
    rates, memory = case["images_per_s"], case["peak_mib"]
    speed = median(rates)
    return (
        case["name"],
        f"{speed / target:.2f}",
        f"{speed:,.0f}",
        f"{min(rates):,.0f} - {max(rates):,.0f}",
        f"{1e3 * case['images'] / speed:.2f} ms",
        f"{memory:,.0f} MiB" if memory is not None else "",
    )


def _kernel_lines(stage: dict) -> Iterator[str]:
    first, rows = stage["cases"][0], stage["kernels"]
    working = sum(row["ms"] for row in rows)
    step = 1e3 * first["images"] / median(first["images_per_s"])
    yield (
        f"{first['name']}: the device works {working:.2f} ms of a step of {step:.2f} ms, in "
        f"{sum(row['calls'] for row in rows):.0f} calls."
    )
    yield ""
    yield from table(
        ("where the time goes", "share", "of a step", "calls"),
        (
            (row["name"][:72].replace("|", "/"), f"{row['share']:.1%}", f"{row['ms']:.3f} ms", f"{row['calls']:.1f}")
            for row in rows[:KERNELS]
        ),
    )


if __name__ == "__main__":
    typer.run(main)
