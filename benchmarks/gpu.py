"""The GPU projector: is it right on this device, and how fast beside other programs' form and beside the memory.

    python -m benchmarks.gpu OUT [--quick]

First the kernels, compiled for this device, are compared with a dense sum in float64; the command ends there if one is
wrong. Then, forward and backward, on the same Gaussians in the same poses:

    splat 4σ, splat 5σ   `project` with its local splat (backend triton)
    dense fused          `project` with products in half precision and profiles never in memory (backend triton-dense)
    dense bmm, half      every Gaussian on every pixel by torch.bmm of half-precision profiles and plain autograd, as
                         published programs do it
    dense torch          `project` with its reference in float32 (backend torch)
    copy                 a device copy that moves the bytes no program can avoid: what goes in and out of either direction

Dense sums by autograd run over some images at a time where all do not fit. Methods take turns within a round. A time is
that of the GPU, not of Python: CUDA events around work that was queued while the GPU was kept busy, with a cold cache. A
ratio is the median of the rounds' ratios. The last table is for the choice of a backend: dense against splat, by box and
width. OUT gets gpu.json and gpu.md.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.machine import describe_machine, machine_line
from benchmarks.projector import QUANTITIES, Scene, make_scene
from benchmarks.tables import table, write
from spire_dist.physics.projector import Backend, project
from spire_dist.progress import progress

CASES = ((64, 2048, 64), (128, 4096, 256), (256, 65536, 64))
QUICK_CASES = ((64, 2048, 8),)
"""(box, Gaussians, images)."""
BUDGETS = {
    "splat 4σ": (1e-4, 5e-4, 1e-4, 1e-3),
    "splat 5σ": (1e-6, 1e-5, 1e-5, 1e-5),
    "dense fused": (5e-4, 1e-3, 1e-3, 1e-3),
}
"""Relative L2 errors of `QUANTITIES` above which a kernel is called wrong."""
CHECKED_BOXES = (64, 100, 129)
"""A multiple of 8, of 4, and odd: the kernels treat them differently."""
CHOICE_BOXES = (32, 64, 96, 128, 192, 256)
CHOICE_WIDTHS_PX = (1.0, 1.5, 2.0, 4.0, 8.0)
"""Of the table of dense against splat."""
BUSY_CYCLES = 40_000_000
"""The GPU waits some 20 ms while a call is queued."""
CACHE_BYTES = 256 * 2**20
"""More than any second-level cache holds; written before each call."""


class Method(NamedTuple):
    """A projector, and how many images it takes at once."""

    forward: Callable[[Scene], Tensor]
    images: int


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the results.")],
    quick: Annotated[bool, typer.Option(help="One small case, few rounds: a look, not a measurement.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each case [3 if quick].")] = 30,
) -> None:
    """Check and time the GPU projector; print tables, write JSON and Markdown."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        raise typer.Exit(2)
    rounds = 3 if quick else rounds
    result: dict = {"machine": describe_machine(), "gpu": describe_gpu(), "check": check_kernels()}
    wrong = [name for name, errors in result["check"].items() if not within(BUDGETS[name], errors)]
    if not wrong:
        result["cases"] = [measure(*case, rounds) for case in (QUICK_CASES if quick else CASES)]
        result["choice"] = compare_by_box_and_width(CHOICE_BOXES[:2] if quick else CHOICE_BOXES, min(rounds, 10))
    text = list(lines(result))
    print("\n".join(("", *text)))
    write(out, "gpu", result, text)
    if wrong:
        print(f"wrong on this device, so nothing was timed: {', '.join(wrong)}")
        raise typer.Exit(1)


# ---- methods


def ours(backend: Backend, cut: float = 4.0) -> Callable[[Scene], Tensor]:
    """`project` with a backend."""

    def forward(scene: Scene) -> Tensor:
        return project(*scene[:5], box=scene.upstream.shape[-1], pixel_size=1.0, cut=cut, backend=backend)

    return forward


def dense_bmm_half(scene: Scene) -> Tensor:
    """Images [B, box, box]: a profile per axis, image and Gaussian, contracted over Gaussians in half precision."""
    box, dtype = scene.upstream.shape[-1], scene.centres.dtype
    pixels = torch.arange(box, dtype=dtype, device=scene.centres.device)
    planar = (scene.rotations @ scene.centres.mT)[:, :2] + scene.shifts[:, :, None] + box // 2
    factor = -1 / (2 * scene.widths[:, None] ** 2)
    profile_x = torch.exp(factor * (pixels - planar[:, 0, :, None]) ** 2)  # [B, N, box]
    profile_y = torch.exp(factor * (pixels - planar[:, 1, :, None]) ** 2)
    weights = scene.amplitudes * scene.widths * math.sqrt(2 * math.pi)
    profile_y = weights[..., None] * profile_y
    return torch.bmm(profile_y.half().mT, profile_x.half()).to(dtype)


def our_kernels(images: int) -> dict[str, Method]:
    """The kernels that are checked."""
    return {
        "splat 4σ": Method(ours("triton", 4.0), images),
        "splat 5σ": Method(ours("triton", 5.0), images),
        "dense fused": Method(ours("triton-dense"), images),
    }


def images_that_fit(box: int, gaussians: int, images: int, bytes_per_value: int) -> int:
    """Images of a dense sum by autograd whose dozen arrays of B × N × box fill at most half of the free memory."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(images, int(free / 2 / (12 * bytes_per_value * gaussians * box))))


def run(method: Method, scene: Scene) -> tuple[list[Tensor], list[torch.cuda.Event]]:
    """[image, gradients of centres, amplitudes, widths], and events: start, then after forward and backward of each part."""
    found: list[list[Tensor]] = []
    events = [_event()]
    for first in range(0, len(scene.upstream), method.images):
        some = slice(first, first + method.images)
        leaves = [t.detach().requires_grad_() for t in (scene.centres[some], scene.amplitudes[some], scene.widths)]
        part = Scene(*leaves, *(t[some] for t in scene[3:]))
        image = method.forward(part)
        events.append(_event())
        found.append([image.detach(), *torch.autograd.grad(image, leaves, part.upstream)])
        events.append(_event())
    images, d_centres, d_amplitudes, d_widths = zip(*found, strict=True)
    return [torch.cat(images), torch.cat(d_centres), torch.cat(d_amplitudes), torch.stack(d_widths).sum(0)], events


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# ---- checks


def on_gpu(scene: Scene, dtype: torch.dtype) -> Scene:
    """The scene in a precision on the GPU."""
    return Scene(*(t.to("cuda", dtype) for t in scene))


def errors_of(methods: dict[str, Method], scene: Scene) -> dict[str, dict[str, float]]:
    """Relative L2 error of the image and of each gradient against the dense sum in float64."""
    sizes = scene.upstream.shape[-1], len(scene.widths), len(scene.upstream)
    exact, _ = run(Method(ours("torch"), images_that_fit(*sizes, 8)), on_gpu(scene, torch.float64))
    errors = {}
    for name, method in methods.items():
        found, _ = run(method, on_gpu(scene, torch.float32))
        values = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        errors[name] = dict(zip(QUANTITIES, values, strict=True))
    return errors


def check_kernels() -> dict[str, dict[str, float]]:
    """The largest errors of our kernels over some boxes."""
    found = [errors_of(our_kernels(3), make_scene(box, 1000, 3, seed=box)) for box in CHECKED_BOXES]
    return {name: {q: max(errors[name][q] for errors in found) for q in QUANTITIES} for name in found[0]}


def within(budget: tuple[float, ...], errors: dict[str, float]) -> bool:
    """Whether no error is above its budget, or not a number."""
    return all(error <= limit for error, limit in zip(errors.values(), budget, strict=True))


# ---- times


def time_methods(methods: dict[str, Method], scene: Scene, rounds: int, what: str) -> dict[str, np.ndarray]:
    """Milliseconds [rounds, 2] of every method and of the copy: forward, both. Three more rounds compile and warm up."""
    flushed = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    moved = 4 * (3 * 4 * scene.amplitudes.numel() + 2 * scene.upstream.numel())  # Gaussians in twice, gradients, images
    source, target = torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda")
    times: dict[str, list] = {name: [] for name in (*methods, "copy")}
    for number in progress(range(-3, rounds), what, total=rounds + 3, unit="round"):
        for name in times:
            torch.cuda._sleep(BUSY_CYCLES)
            flushed.zero_()
            if name == "copy":
                events = [_event()]
                target.copy_(source)
                events += [_event(), _event()]
            else:
                _, events = run(methods[name], scene)
            torch.cuda.synchronize()
            if number >= 0:
                forward = sum(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=False))
                times[name].append((forward, events[0].elapsed_time(events[-1])))
    return {name: np.array(values) for name, values in times.items()}


def peak_mib(method: Method, scene: Scene) -> float:
    """Rise of the device's memory in one call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(method, scene)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(box: int, gaussians: int, images: int, rounds: int) -> dict:
    """Times, memory and errors of all methods in one case."""
    some = images_that_fit(box, gaussians, images, 4)
    methods = our_kernels(images) | {
        "dense bmm, half": Method(dense_bmm_half, some),
        "dense torch": Method(ours("torch"), some),
    }
    exact = make_scene(box, gaussians, images)
    errors = errors_of(methods, exact)
    scene = on_gpu(exact, torch.float32)
    times = time_methods(methods, scene, rounds, f"box {box}")
    rows = {}
    for name, values in times.items():
        both = values[:, 1]
        low, middle, high = np.percentile(both, (25, 50, 75))
        rows[name] = {
            "times_slower": float(np.median(both / times["splat 4σ"][:, 1])),
            "times_copy": float(np.median(both / times["copy"][:, 1])),
            "both_ms": float(middle),
            "both_quartiles_ms": [float(low), float(high)],
            "forward_ms": float(np.median(values[:, 0])),
        }
        if name in methods:
            rows[name] |= {"peak_mib": peak_mib(methods[name], scene), "errors": errors[name]}
    case = {"box": box, "gaussians": gaussians, "images": images, "images_at_once_by_autograd": some, "rounds": rounds}
    return case | {"methods": rows}


def compare_by_box_and_width(boxes: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """By box and by width of all Gaussians: times that the dense sum takes longer than the splat."""
    methods = our_kernels(64)
    del methods["splat 5σ"]
    ratios: dict[str, dict[str, float]] = {}
    for box in boxes:
        scene = on_gpu(make_scene(box, 4096, 64), torch.float32)
        ratios[str(box)] = {}
        for width in CHOICE_WIDTHS_PX:
            wide = scene._replace(widths=torch.full_like(scene.widths, width))
            times = time_methods(methods, wide, rounds, f"box {box}, width {width:g} px")
            ratios[str(box)][f"{width:g}"] = float(np.median(times["dense fused"][:, 1] / times["splat 4σ"][:, 1]))
    return ratios


# ---- text


def describe_gpu() -> dict[str, str]:
    """The device and the versions that made its code."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def lines(result: dict) -> Iterator[str]:
    """The result as Markdown that also reads well in a terminal, ratios first."""
    yield "## The projector on a GPU"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in result["gpu"].items())
    yield ""
    yield machine_line(result["machine"])
    yield ""
    yield from table(
        ("largest error in three boxes", *QUANTITIES),
        ((name, *(f"{value:.1e}" for value in errors.values())) for name, errors in result["check"].items()),
    )
    for case in result.get("cases", ()):
        yield ""
        yield (
            f"{case['box']} px, {case['gaussians']:,} Gaussians, {case['images']} images "
            f"({case['images_at_once_by_autograd']} at once by autograd), {case['rounds']} rounds"
        )
        yield ""
        yield from table(
            ("", "times slower", "times copy", "forward + backward", "quartiles", "forward", "memory", *QUANTITIES),
            (_row(name, row) for name, row in case["methods"].items()),
        )
    if "choice" in result:
        yield ""
        yield "Time of dense fused over that of splat 4σ, 4,096 Gaussians of one width in 64 images:"
        yield ""
        yield from table(
            ("box", *(f"{width:g} px" for width in CHOICE_WIDTHS_PX)),
            ((f"{box} px", *(f"{ratio:.2f}" for ratio in row.values())) for box, row in result["choice"].items()),
        )


def _row(name: str, row: dict) -> tuple[str, ...]:
    low, high = row["both_quartiles_ms"]
    return (
        name,
        f"{row['times_slower']:.2f}",
        f"{row['times_copy']:.1f}",
        f"{row['both_ms']:.3f} ms",
        f"{low:.3f} - {high:.3f} ms",
        f"{row['forward_ms']:.3f} ms",
        f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else "",
        *(f"{row['errors'][quantity]:.1e}" if "errors" in row else "" for quantity in QUANTITIES),
    )


if __name__ == "__main__":
    typer.run(main)
