"""The CPU projector against the dense sum that other programs use: speed, and errors against float64.

    python -m benchmarks.projector OUT [--quick]

Compared, forward and backward, on the same Gaussians in the same poses:

    local 4σ, local 5σ   `spire_dist.physics.projector.project` with its local splat
    dense einsum         every Gaussian on every pixel by a separable einsum and plain autograd, written as published
                         CPU and GPU programs do it
    dense compiled       the same under torch.compile, where a C++ compiler is found

Methods take turns within a round, so that another load of the machine meets all of them, and a ratio is the median of the
rounds' ratios. The upstream gradient is white noise. OUT gets projector.json, projector.md and projector.png.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.machine import describe_machine, machine_line, use_threads
from benchmarks.tables import table, write
from spire_dist.physics.poses import random_rotations
from spire_dist.physics.projector import project
from spire_dist.progress import progress

CASES = ((64, 2048, 32), (128, 4096, 16), (256, 16384, 4))
QUICK_CASES = ((32, 256, 8), (64, 512, 4))
"""(box, Gaussians, images)."""
CUTS = (4.0, 5.0)
WIDTHS_PX = (1.0, 2.0)
RADIUS = 0.36
"""Of the ball that holds the centres, as a share of the box."""
QUANTITIES = ("image", "d_centres", "d_amplitudes", "d_widths")


class Scene(NamedTuple):
    """Arguments of `project` in pixels, and the gradient sent back through it."""

    centres: Tensor  # [B, N, 3]
    amplitudes: Tensor  # [B, N]
    widths: Tensor  # [N]
    rotations: Tensor  # [B, 3, 3]
    shifts: Tensor  # [B, 2]
    upstream: Tensor  # [B, box, box]

    def to(self, dtype: torch.dtype) -> "Scene":
        """Copies of another precision; the first three ask for gradients."""
        return Scene(*(t.detach().to(dtype, copy=True).requires_grad_(i < 3) for i, t in enumerate(self)))


Projector = Callable[[Scene], Tensor]


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the results.")],
    quick: Annotated[bool, typer.Option(help="Small cases, few rounds, nothing compiled.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each case [3 if quick].")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Also time the dense sum under torch.compile.")] = True,
) -> None:
    """Time and check the projector; print tables, write JSON, Markdown and a plot."""
    threads = use_threads(threads)
    with_compiler = compiled and not quick and any(map(shutil.which, ("c++", "g++", "clang++")))
    result: dict = {"machine": describe_machine(threads), "cases": []}
    for box, gaussians, images in QUICK_CASES if quick else CASES:
        scene = make_scene(box, gaussians, images)
        methods = dict(methods_of(box, with_compiler))
        times = time_methods(methods, scene.to(torch.float32), 3 if quick else rounds)
        errors = errors_of(methods, scene)
        case = {"box": box, "gaussians": gaussians, "images": images, "rounds": len(times["dense einsum"])}
        result["cases"].append(case | {"methods": summarise(times, images * gaussians), "errors": errors})
    text = list(lines(result))
    print("\n".join(("", *text)))
    write(out, "projector", result, text)
    plot(result, out / "projector.png")


def make_scene(box: int, gaussians: int, images: int, seed: int = 0) -> Scene:
    """Gaussians in a ball that stays inside the box, widths uniform in `WIDTHS_PX`, one deformation per image; float64."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((gaussians, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ball = RADIUS * box * rng.random((gaussians, 1)) ** (1 / 3) * directions
    arrays = (
        ball + 0.5 * rng.standard_normal((images, gaussians, 3)),
        rng.uniform(0.5, 1.5, (images, gaussians)),
        rng.uniform(*WIDTHS_PX, gaussians),
        random_rotations(images, seed=seed),
        rng.uniform(-2, 2, (images, 2)),
        rng.standard_normal((images, box, box)),
    )
    return Scene(*(torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in arrays))


def dense_einsum(scene: Scene) -> Tensor:
    """Images [B, box, box]: a profile per axis, image and Gaussian, contracted over Gaussians."""
    box = scene.upstream.shape[-1]
    pixels = torch.arange(box, dtype=scene.centres.dtype)
    planar = (scene.rotations @ scene.centres.transpose(1, 2))[:, :2] + scene.shifts[:, :, None] + box // 2
    factor = -1 / (2 * scene.widths[:, None] ** 2)
    profile_x = torch.exp(factor * (pixels - planar[:, 0, :, None]) ** 2)  # [B, N, box]
    profile_y = torch.exp(factor * (pixels - planar[:, 1, :, None]) ** 2)
    weights = scene.amplitudes * scene.widths * math.sqrt(2 * math.pi)
    return torch.einsum("bny,bnx->byx", weights[..., None] * profile_y, profile_x)


def local_splat(cut: float) -> Projector:
    """Our projector, its windows ending at `cut` standard deviations."""

    def run(scene: Scene) -> Tensor:
        return project(*scene[:5], box=scene.upstream.shape[-1], pixel_size=1.0, cut=cut)

    return run


def methods_of(box: int, with_compiler: bool) -> Iterator[tuple[str, Projector]]:
    """The methods by name, ours first."""
    for cut in CUTS:
        yield f"local {cut:g}σ", local_splat(cut)
    yield "dense einsum", dense_einsum
    if with_compiler:
        torch._dynamo.reset()  # each case is compiled for its own shapes
        yield "dense compiled", torch.compile(dense_einsum, dynamic=False)


def forward_backward(method: Projector, scene: Scene) -> tuple[Tensor, tuple[Tensor, ...], float, float]:
    """(images, gradients, seconds forward, seconds forward and backward)."""
    start = time.perf_counter()
    images = method(scene)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(images, scene[:3], scene.upstream)
    return images.detach(), gradients, middle - start, time.perf_counter() - start


def time_methods(methods: dict[str, Projector], scene: Scene, rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds, 2] of every method: forward, forward and backward. The first two rounds compile and warm up."""
    times: dict[str, list] = {name: [] for name in methods}
    for number in progress(range(-2, rounds), f"box {scene.upstream.shape[-1]}", total=rounds + 2, unit="round"):
        for name, method in methods.items():
            seconds = forward_backward(method, scene)[2:]
            if number >= 0:
                times[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}


def errors_of(methods: dict[str, Projector], scene: Scene) -> dict[str, dict[str, float]]:
    """Relative L2 error of the image and of each gradient, float32 against the dense sum in float64."""
    exact = forward_backward(dense_einsum, scene.to(torch.float64))
    errors = {}
    for name, method in methods.items():
        found = forward_backward(method, scene.to(torch.float32))
        pairs = zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True)
        values = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        errors[name] = dict(zip(QUANTITIES, values, strict=True))
    return errors


def summarise(times: dict[str, np.ndarray], pairs: int) -> dict[str, dict[str, float]]:
    """Per method: medians in ms, quartiles, ns per (image, Gaussian), and how many times slower than local 4σ it is."""
    base = times[f"local {CUTS[0]:g}σ"][:, 1]
    summary = {}
    for name, seconds in times.items():
        low, middle, high = np.percentile(1e3 * seconds[:, 1], (25, 50, 75))
        summary[name] = {
            "times_slower": float(np.median(seconds[:, 1] / base)),
            "forward_ms": float(np.median(1e3 * seconds[:, 0])),
            "both_ms": float(middle),
            "both_quartiles_ms": [float(low), float(high)],
            "ns_per_pair": float(1e6 * middle / pairs),
        }
    return summary


def lines(result: dict) -> Iterator[str]:
    """The result as Markdown that also reads well in a terminal, ratios first."""
    yield "## The projector"
    yield ""
    yield machine_line(result["machine"])
    for case in result["cases"]:
        yield ""
        yield f"{case['box']} px, {case['gaussians']:,} Gaussians, {case['images']} images, {case['rounds']} rounds"
        yield ""
        yield from table(
            ("", "times slower", "forward + backward", "quartiles", "forward", "per pair", *QUANTITIES),
            (_row(name, row, case["errors"][name]) for name, row in case["methods"].items()),
        )
    yield ""
    yield "A pair is one Gaussian in one image. The last four columns: relative L2 error against the dense sum in float64."


def _row(name: str, row: dict, errors: dict[str, float]) -> tuple[str, ...]:
    low, high = row["both_quartiles_ms"]
    times = f"{row['times_slower']:.2f}", f"{row['both_ms']:.1f} ms", f"{low:.1f} - {high:.1f} ms"
    rest = f"{row['forward_ms']:.1f} ms", f"{row['ns_per_pair']:.0f} ns", *(f"{value:.1e}" for value in errors.values())
    return name, *times, *rest


def plot(result: dict, path: Path) -> None:
    """Time per (image, Gaussian) over the box, and the errors of the largest case."""
    cases = result["cases"]
    names = list(cases[0]["methods"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in names:
        left.loglog([c["box"] for c in cases], [c["methods"][name]["ns_per_pair"] for c in cases], "o-", label=name)
    left.set_xticks([c["box"] for c in cases], [str(c["box"]) for c in cases], minor=False)
    left.minorticks_off()
    left.set(xlabel="box (px)", ylabel="ns per (image, Gaussian), forward + backward")
    left.legend(frameon=False)
    for i, name in enumerate(names):
        heights = [cases[-1]["errors"][name][quantity] for quantity in QUANTITIES]
        right.bar(np.arange(len(QUANTITIES)) + (i - len(names) / 2 + 0.5) / (len(names) + 1), heights, 0.2, label=name)
    right.set_xticks(range(len(QUANTITIES)), QUANTITIES)
    right.set(yscale="log", ylabel="relative error against float64", title=f"box {cases[-1]['box']} px")
    threads = result["machine"]["threads"]
    left.set_title(f"{threads} thread{'s' if threads > 1 else ''}, {result['machine']['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
