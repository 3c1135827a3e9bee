"""Fourier shell correlation: the benchmark's, to the voxel, and the usual one between two maps. They differ.

    benchmark_fsc   entry i holds the shell i-1 <= r < i, entry 0 is 1 by definition, entries 1 .. D/2-1; rounded to
                    seven decimals and clipped to [0, 1]. Its area (`auc`) is the number in CryoBench's tables, at
                    most (D/2-1)/D.
    map_fsc         entry i holds round(r) = i, entries 0 .. D/2, neither rounded nor clipped: half-map curves and
                    resolutions.

r is the distance in voxels from the zero frequency, over the full cube. The transform used here is the half one of real
data, in which every coefficient off the plane x = 0 counts twice: the sums are those of the full cube. A mask
multiplies both maps in real space as it is; no correction for it is made (no phase randomisation), so state it with
every number.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.fft

from spire_dist.errors import SourceError

Shells = Literal["benchmark", "rounded"]


@dataclass(frozen=True)
class Spectrum:
    """The Fourier coefficients of a map inside the last shell, with the power of each shell."""

    box: int
    shells: Shells
    coefficients: np.ndarray  # complex128 [points inside the last shell]
    power: np.ndarray  # float64 [number of shells], sum of |F|²


@dataclass(frozen=True)
class MapFsc:
    """Correlation of two maps: `frequencies` in 1/Å, `curve` in [-1, 1], resolutions in Å at 0.143 and 0.5."""

    frequencies: np.ndarray
    curve: np.ndarray
    resolution_0143: float
    resolution_05: float


@lru_cache(maxsize=4)
def _lattice(box: int, shells: Shells) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of the half transform: indices inside the last shell, their shell, how often each counts; number of shells."""
    if box % 2 and shells == "benchmark":
        raise SourceError(f"FSC: a box of {box} px is odd; the benchmark's shells are defined for an even box")
    line = np.fft.fftfreq(box, 1 / box)  # integers
    half = np.arange(box // 2 + 1)
    radius = np.sqrt(line[:, None, None] ** 2 + line[None, :, None] ** 2 + half**2).ravel()
    index = (np.floor(radius) + 1 if shells == "benchmark" else np.rint(radius)).astype(np.int64)
    count = box // 2 if shells == "benchmark" else box // 2 + 1
    inside = np.flatnonzero(index < count)
    column = inside % len(half)
    twice = np.where((column == 0) | (2 * column == box), 1.0, 2.0)
    return inside, index[inside], twice, count


def spectrum(volume: np.ndarray, mask: np.ndarray | None = None, shells: Shells = "benchmark") -> Spectrum:
    """Transform of a map [D, D, D] times a mask of the same shape, ready for `correlate`."""
    box = volume.shape[0]
    if volume.shape != (box, box, box) or (mask is not None and mask.shape != volume.shape):
        shape = volume.shape if mask is None else f"{volume.shape} with a mask of {mask.shape}"
        raise SourceError(f"FSC: a map of {shape}; both must be cubes of one size")
    inside, shell, twice, count = _lattice(box, shells)
    masked = volume.astype(np.float64) if mask is None else volume.astype(np.float64) * mask
    coefficients = np.asarray(scipy.fft.rfftn(masked)).ravel()[inside]
    power = np.bincount(shell, twice * np.abs(coefficients) ** 2, minlength=count)
    return Spectrum(box, shells, coefficients, power)


def correlate(a: Spectrum, b: Spectrum) -> np.ndarray:
    """`Re Σ conj(A) B / √(Σ|A|² Σ|B|²)` of each shell; as it comes, in [-1, 1].

    Where a map has nothing: 1 in the benchmark's shells, as the benchmark has it, and 0 in the rounded ones.
    """
    if (a.box, a.shells) != (b.box, b.shells):
        raise SourceError(f"FSC: boxes of {a.box} and {b.box} px; both maps must have the same")
    _, shell, twice, count = _lattice(a.box, a.shells)
    cross = np.bincount(shell, twice * np.real(a.coefficients.conj() * b.coefficients), minlength=count)
    norm = np.sqrt(a.power * b.power)
    empty = np.full(count, 1.0 if a.shells == "benchmark" else 0.0)
    return np.divide(cross, norm, out=empty, where=norm > 0)


def without_mean(spectra: list[Spectrum]) -> list[Spectrum]:
    """Spectra of maps in one box, each without the mean of all: of what differs between them."""
    _, shell, twice, count = _lattice(spectra[0].box, spectra[0].shells)
    mean = sum(each.coefficients for each in spectra) / len(spectra)
    rest = [each.coefficients - mean for each in spectra]
    powers = [np.bincount(shell, twice * np.abs(own) ** 2, minlength=count) for own in rest]
    return [Spectrum(each.box, each.shells, *found) for each, *found in zip(spectra, rest, powers, strict=True)]


def benchmark_curve(a: Spectrum, b: Spectrum) -> np.ndarray:
    """The benchmark's curve [D/2] of two spectra with its shells: rounded to seven decimals, clipped, entry 0 = 1."""
    curve = np.clip(np.round(correlate(a, b), 7), 0.0, 1.0)
    curve[0] = 1.0
    return curve


def benchmark_fsc(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The benchmark's curve [D/2] of two maps [D, D, D]; entry i stands at i / D cycles per voxel."""
    return benchmark_curve(spectrum(a, mask), spectrum(b, mask))


def auc(curve: np.ndarray) -> float:
    """Area under a benchmark curve [D/2] over i / D by trapezoids, not normalised; `ceiling(D)` for a perfect map."""
    return float(np.trapezoid(curve, dx=0.5 / len(curve)))


def ceiling(box: int) -> float:
    """The largest `auc` a box allows: (D/2 - 1) / D."""
    return (box // 2 - 1) / box


def map_fsc(a: np.ndarray, b: np.ndarray, pixel_size: float, mask: np.ndarray | None = None) -> MapFsc:
    """FSC of two maps [D, D, D] in shells round(r) = i, with the resolutions at 0.143 and 0.5 (pixel size in Å).

    A resolution is where the curve first falls below the threshold, linearly between shells; Nyquist if it never does.
    """
    curve = correlate(spectrum(a, mask, "rounded"), spectrum(b, mask, "rounded"))
    frequencies = np.arange(len(curve)) / (a.shape[0] * pixel_size)
    return MapFsc(frequencies, curve, *(resolution(frequencies, curve, level) for level in (0.143, 0.5)))


def describe(found: MapFsc) -> str:
    """A comparison of two maps as lines for a terminal: the resolutions, then the curve shell by shell."""
    lines = [f"FSC 0.143: {found.resolution_0143:.2f} Å   FSC 0.5: {found.resolution_05:.2f} Å   (shells round(r) = i)"]
    lines.append(f"{'shell':>5}{'Å':>10}{'FSC':>9}")
    for shell, (frequency, value) in enumerate(zip(found.frequencies, found.curve, strict=True)):
        lines.append(f"{shell:5d}{1 / frequency if frequency else np.inf:10.2f}{value:9.4f}")
    return "\n".join(lines)


def resolution(frequencies: np.ndarray, curve: np.ndarray, threshold: float) -> float:
    """Å at which a curve over frequencies (1/Å) first falls below a threshold, the zero frequency not counted."""
    below = np.flatnonzero(curve[1:] < threshold) + 1
    if not len(below):
        return float(1 / frequencies[-1])
    last, first = below[0] - 1, below[0]
    if last == 0:
        return float(1 / frequencies[first])
    share = (curve[last] - threshold) / (curve[last] - curve[first])
    return float(1 / (frequencies[last] + share * (frequencies[first] - frequencies[last])))


def save_curve(path: Path, curve: np.ndarray) -> None:
    """A benchmark curve as its text file: columns `pixres` (cycles per voxel) and `fsc`, separated by a blank."""
    table = np.column_stack([np.arange(len(curve)) / (2 * len(curve)), curve])
    np.savetxt(path, table, fmt="%.7f", header="pixres fsc", comments="")
