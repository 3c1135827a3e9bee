"""How the projector's time grows with images and with Gaussians. Called by `benchmarks.step`."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.projector import forward_backward, local_splat, make_scene
from benchmarks.tables import table
from spire_dist.progress import progress

BOX = 128
IMAGES, GAUSSIANS = (16, 64, 256, 1024), (4096, 16384, 65536, 262144)
FIXED_IMAGES, FIXED_GAUSSIANS = 16, 4096


def measure(rounds: int) -> dict:
    """Median seconds of forward + backward at every size; the sizes take turns within a round."""
    sizes = [(images, FIXED_GAUSSIANS) for images in IMAGES] + [(FIXED_IMAGES, count) for count in GAUSSIANS]
    scenes = [make_scene(BOX, gaussians, images).to(torch.float32) for images, gaussians in sizes]
    method = local_splat(4.0)
    times: list[list[float]] = [[] for _ in scenes]
    for number in progress(range(-1, rounds), "growth", total=rounds + 1, unit="round"):
        for scene, seconds in zip(scenes, times, strict=True):
            taken = forward_backward(method, scene)[3]
            if number >= 0:  # the first round compiles and warms up
                seconds.append(taken)
    medians = np.median(times, axis=1)
    by_images, by_gaussians = medians[: len(IMAGES)], medians[len(IMAGES) :]
    return {
        "box": BOX,
        "rounds": rounds,
        "images": _series(IMAGES, by_images, FIXED_GAUSSIANS),
        "gaussians": _series(GAUSSIANS, by_gaussians, FIXED_IMAGES),
    }


def _series(sizes: tuple[int, ...], seconds: np.ndarray, fixed: int) -> dict:
    per_pair = 1e9 * seconds / (np.array(sizes) * fixed)
    return {
        "sizes": sizes,
        "fixed": fixed,
        "ms": (1e3 * seconds).tolist(),
        "ns_per_pair": per_pair.tolist(),
        "exponent": exponent(sizes, seconds),
    }


def exponent(sizes: tuple[int, ...], seconds: np.ndarray) -> float:
    """The p of `seconds ∝ sizes^p` through the points, by least squares in logarithms; 1 is linear growth."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def lines(result: dict) -> Iterator[str]:
    """The result as text, exponents first."""
    rows = []
    for varied, other in (("images", "Gaussians"), ("Gaussians", "images")):
        series = result[varied.lower()]
        rows += [
            (f"{size:,} {varied}, {series['fixed']:,} {other}", f"{ms:.2f} ms", f"{ns:.0f} ns")
            for size, ms, ns in zip(series["sizes"], series["ms"], series["ns_per_pair"], strict=True)
        ]
    by_images, by_gaussians = result["images"]["exponent"], result["gaussians"]["exponent"]
    yield "## Growth of the projector's time"
    yield ""
    yield (
        f"Time grows as images^{by_images:.2f} and as Gaussians^{by_gaussians:.2f} (1 is linear; a call's fixed cost makes "
        f"it less); {result['box']} px, forward + backward at 4σ, medians of {result['rounds']} rounds."
    )
    yield ""
    yield from table(("", "time", "per (image, Gaussian)"), rows)
