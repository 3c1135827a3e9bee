"""How far it scales: a model of a step's time, checked on two ranks of this machine and carried on to 8-512 GPUs.

    python -m benchmarks.scaling OUT [--pair-ns 2.5 --step-ms 3 ...]

A step takes what its pairs of image and Gaussian, its images and Python take, then what its messages take: bytes (the formula
of `benchmarks.ranks`) over bandwidth, and a latency for each hop. Ranks wait for the slowest one, a part of a step's work.
Nothing overlaps, and data are there in time. The check takes the costs from one rank alone, messages of two, and two that
multiply matrices and wait for each other; it predicts steps of two. For GPUs the costs are assumptions, each an option; put in
those of your machine.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import log2
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from scipy.optimize import nnls

from benchmarks.machine import describe_machine, machine_line
from benchmarks.ranks import Case, measure, on_ranks, traffic
from benchmarks.tables import table, write
from spire_dist.distributed.mesh import init_distributed
from spire_dist.progress import progress


@dataclass(frozen=True)
class Costs:
    """What the model knows of a machine."""

    pair_ns: float
    """One Gaussian in one image, forward and backward, its networks included."""
    pixel_ns: float
    """One pixel of an image: Fourier transform, CTF, comparison, forward and backward."""
    gaussian_ns: float
    """One Gaussian, however many images: its gradients and its step of the optimiser."""
    step_ms: float
    """What every step takes, however small: Python, launches."""
    inside_gb: float
    """GB/s that a rank sends to another one of its node,"""
    between_gb: float
    """and to one of another node."""
    hop_us: float
    """A message without content, from one rank to the next."""
    uneven: float
    """By how much the slowest of several ranks takes longer than one alone, of its work."""
    per_node: int
    """Ranks of a node."""


COMMON = 30_000
"""Parameters that every rank has: two networks of 3 x 64 and the anchors."""
LONE = [Case(1, 1, gaussians, images, box, 10) for gaussians, images, box in (
    (1024, 16, 64), (8192, 16, 64), (1024, 64, 64), (8192, 64, 64), (65536, 2, 64), (1024, 16, 128), (1024, 64, 128),
    (16384, 32, 128))]  # fmt: skip
PAIRS = [Case(*size, gaussians, images, box, 20) for gaussians, images, box in (
    (2048, 32, 64), (8192, 64, 128), (65536, 16, 128)) for size in ((2, 1), (1, 2))]  # fmt: skip
WORLDS = (8, 16, 32, 64, 128, 256, 512)
RUNS = [(16_384, 128, 64), (65_536, 256, 64), (1_000_000, 256, 64), (16_384, 128, None), (65_536, 256, None)]
"""Gaussians, box, and images for each GPU; None where there are FIXED in all."""
FIXED = 512


def main(
    out: Annotated[Path, typer.Argument(help="Folder for results.")],
    pair_ns: float = 2.5,
    pixel_ns: float = 0.05,
    gaussian_ns: float = 0.5,
    step_ms: float = 3.0,
    inside_gb: float = 200.0,
    between_gb: float = 25.0,
    hop_us: float = 15.0,
    uneven: float = 0.05,
    per_node: int = 8,
) -> None:
    """Check the model, print what it says of more ranks, write JSON and Markdown."""
    assumed = Costs(pair_ns, pixel_ns, gaussian_ns, step_ms, inside_gb, between_gb, hop_us, uneven, per_node)
    here = calibrate()
    checks = [{"case": asdict(case), "measured": measure(case)["seconds"], "model": step_seconds(case, here)}
              for case in progress(PAIRS, "two ranks", unit="case")]  # fmt: skip
    result = {"machine": describe_machine(1), "here": asdict(here), "checks": checks, "assumed": asdict(assumed)}
    text = ["## How far it scales", "", *check_lines(result, here), "", *assumed_lines(assumed)]
    print("\n".join(text))
    write(out, "scaling", result, text)


def step_seconds(case: Case, costs: Costs, common: int = COMMON) -> float:
    """The model: seconds of one step."""
    known = np.array([costs.pair_ns, costs.pixel_ns, costs.gaussian_ns, 1e6 * costs.step_ms])
    work = 1e-9 * float(known @ _work(case)) * (1 + (costs.uneven if case.world > 1 else 0))
    sent, gauss, hop = traffic(case, common), case.gauss, 1e-6 * costs.hop_us
    # Latents and poses go there, latents' gradients and images both ways; sums go up and down a tree, the last one agrees.
    hops = 5 * (gauss - 1) + 2 * (log2(case.replicate) + 2 * log2(case.world))
    in_node = {"images": gauss, "latents": gauss, "gaussians": costs.per_node // gauss, "networks": costs.per_node}
    over = {"images": gauss, "latents": gauss, "gaussians": case.world, "networks": case.world}
    return work + hops * hop + sum(
        size / (1e9 * _bandwidth(costs, over[what], in_node[what])) for what, size in sent.items()
    )  # fmt: skip


def _work(case: Case) -> list[float]:
    """How many pairs, pixels, Gaussians and steps a rank has in a step; pairs are the same for every gauss."""
    images = case.images / case.world
    return [images * case.gaussians, images * case.box**2, case.gaussians / case.gauss, 1]


def _bandwidth(costs: Costs, spans: int, neighbours: int) -> float:
    """GB/s of a rank in a ring over `spans` ranks one after the other; neighbours in a node share their ways out of it."""
    if spans <= costs.per_node:
        return costs.inside_gb
    return min(costs.inside_gb, costs.between_gb * max(1, min(neighbours, costs.per_node)))


def best(case: Case, costs: Costs) -> Case:
    """The same with the gauss, of 1, 2, 4, 8, whose step is shortest."""
    meshes = (
        replace(case, replicate=case.world // gauss, gauss=gauss) for gauss in (1, 2, 4, 8) if case.world >= gauss
    )
    return min(meshes, key=lambda mesh: step_seconds(mesh, costs))


# ---- costs of this machine


def calibrate() -> Costs:
    """Costs of a rank with one thread: least squares over steps of one rank alone, and messages of two ranks."""
    seconds = np.array([measure(case)["seconds"] for case in progress(LONE, "one rank", unit="case")])
    counts = np.array([_work(case) for case in LONE])
    costs, _ = nnls(counts / seconds[:, None], np.ones(len(seconds)))  # of relative errors
    hop, bandwidth, uneven = together()
    pair, pixel, gaussian, step = (1e9 * costs).tolist()
    return Costs(pair, pixel, gaussian, 1e-6 * step, 1e-9 * bandwidth, 1e-9 * bandwidth, 1e6 * hop, uneven, 2)


def together() -> tuple[float, float, float]:
    """Seconds of a hop, bytes/s that a rank sends, and `Costs.uneven`, of two ranks."""
    small, large, size, alone, both = on_ranks(2, _together)[0]
    return small / 2, size / (large - small), max(0.0, (both - small) / alone - 1)


def _together() -> list[float]:
    one, many, matrix = torch.ones(1), torch.ones(1 << 22), torch.randn(400, 400)  # 16 MiB

    def multiply() -> None:
        for _ in range(10):
            torch.mm(matrix, matrix)

    with init_distributed(1, "cpu", timeout_s=60) as mesh:
        times = []
        for numbers in (one, many):
            taken = []
            for _ in range(30):
                dist.barrier()
                start = time.perf_counter()
                dist.all_reduce(numbers.fill_(1))
                taken.append(time.perf_counter() - start)
            times.append(median(taken))
        times.append(many.nbytes)  # which is what each of two sends in a ring
        for sharing in (False, True):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(100):
                if mesh.rank == 0 or sharing:
                    multiply()
                if sharing:
                    dist.all_reduce(one.fill_(1))
            times.append((time.perf_counter() - start) / 100)
        return times


# ---- text


def check_lines(result: dict[str, Any], here: Costs) -> Iterable[str]:
    """What the model says of two ranks here, beside what they took."""
    yield f"Two ranks of one thread, over gloo. {machine_line(result['machine'])}"
    yield ""
    yield (f"Costs found: {here.pair_ns:.0f} ns a pair, {here.pixel_ns:.1f} ns a pixel, {here.gaussian_ns:.0f} ns a Gaussian, "
           f"{here.step_ms:.1f} ms a step, {here.inside_gb:.2f} GB/s, {here.hop_us:.0f} µs a hop, "
           f"{here.uneven:.0%} of the work waiting for the slower rank.")  # fmt: skip
    yield ""
    rows = []
    for row in result["checks"]:
        case = Case(**row["case"])
        what = f"{case.replicate} × {case.gauss}: {case.gaussians:,} Gaussians, {case.images} images of {case.box} px"
        rows.append(
            [
                what,
                f"{1e3 * row['model']:.0f} ms",
                f"{1e3 * row['measured']:.0f} ms",
                f"{row['model'] / row['measured']:.2f}",
            ]
        )
    yield from table(["replicate × gauss", "model", "measured", "ratio"], rows)


def assumed_lines(costs: Costs) -> Iterable[str]:
    """The model's steps on 8 to 512 GPUs."""
    yield (
        f"**Assumed, not measured**, of a GPU: {costs.pair_ns:g} ns a pair, {costs.pixel_ns:g} ns a pixel, "
        f"{costs.gaussian_ns:g} ns a Gaussian, {costs.step_ms:g} ms a step, {costs.hop_us:g} µs a hop, {costs.uneven:.0%} "
        f"waiting for the slowest; {costs.per_node} to a "
        f"node, {costs.inside_gb:g} GB/s between them and {costs.between_gb:g} GB/s from each to other nodes. A step's time, "
        "the gauss that makes it shortest, and efficiency beside one GPU with the same images:"
    )
    yield ""
    rows = []
    for gaussians, box, each in RUNS:
        cells = [f"{gaussians:,} at {box} px, " + (f"{each} images each" if each else f"{FIXED} images in all")]
        alone = step_seconds(Case(1, 1, gaussians, each or FIXED, box, 1), costs)
        for world in WORLDS:
            case = best(Case(world, 1, gaussians, each * world if each else FIXED, box, 1), costs)
            seconds = step_seconds(case, costs)
            efficiency = alone / seconds / (1 if each else world)
            cells.append(f"{1e3 * seconds:.1f} ms, {case.gauss}, {efficiency:.0%}")
        rows.append(cells)
    yield from table(["GPUs", *map(str, WORLDS)], rows)


if __name__ == "__main__":
    typer.run(main)
