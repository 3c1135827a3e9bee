"""What two models of the same molecule, trained on different particles, have in common. Called by `results.validate`.

Their latent spaces have nothing in common, so conformations are matched by particles: those of a half whose latents in the run
of all particles are nearest to a point there stand for that point; the half's own latent nearest to the mean of theirs is the
conformation in the half. So a half's map is made by the half's model at a latent of the half's particles. What it knows of the
other half is which of its own particles were asked for.

Motion and parts are compared where the run of all particles has Gaussians, each half speaking through the nearest of its own:
one of them for its part; for its motion the mean of several, since which single Gaussian goes where no map can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree
from sklearn.metrics import adjusted_rand_score

from spire_dist.progress import progress
from spire_dist.results import fsc
from spire_dist.results.agreement import MOSTLY, truth_labels, variable_share
from spire_dist.results.runs import Floats, decode_in_batches
from spire_dist.results.truth import Residues
from spire_dist.training.run import FinishedRun

FEWEST_NEIGHBOURS = 10
MASK_SHARE, MASK_GROWN_PX, MASK_EDGE_PX = 0.02, 2.0, 3.0
"""The soft mask is 1 up to 2 px around densities above 2 % of the largest, and falls to 0 over 3 px more."""
PRESENT = 0.1
"""Of the median peak density: Gaussians below that are switched off, and say nothing of what is near them."""

NEAREST = 8
"""Gaussians whose mean displacement is the motion at a point."""


@dataclass(frozen=True)
class CrossFsc:
    """Correlations of the halves' maps at K conformations, shells round(r) = i, S of them; the mask is `soft_mask`'s."""

    masked: NDArray[np.float64]
    """[K, K, S]: conformation i of the first half with j of the second, inside the mask."""
    unmasked: NDArray[np.float64]
    """[K, S]: equal conformations, whole box."""
    differences: NDArray[np.float64]
    """[K, S]: inside the mask, each half's maps without their mean over the conformations: what is not rigid."""
    pooled_differences: NDArray[np.float64]
    """[S]: the same of all conformations together."""
    likeness: NDArray[np.float64]
    """[K, K]: correlation, over all shells, of these differences of i in the first half and of j in the second."""
    mask: Floats
    """[D, D, D]."""


def match(latents: Floats, own: Floats, points: Floats) -> tuple[Floats, int]:
    """Latents [K, l] of a half's model that stand for `points` [K, L], and how many particles were asked for each.

    latents [n, L]: those of the half's particles in the run of all particles; own [n, l]: in the half's model.
    """
    neighbours = min(len(latents), max(FEWEST_NEIGHBOURS, len(latents) // (4 * len(points))))
    found = []
    for point in points:
        near = np.argpartition(((latents - point) ** 2).sum(axis=1), neighbours - 1)[:neighbours]
        theirs = own[near].astype(np.float64)
        found.append(own[near[((theirs - theirs.mean(axis=0)) ** 2).sum(axis=1).argmin()]])
    return np.stack(found), neighbours


def soft_mask(volume: Floats) -> Floats:
    """A mask [D, D, D] around the density of a map, with an edge that falls as a cosine."""
    outside = volume <= MASK_SHARE * volume.max()
    distance = np.asarray(ndimage.distance_transform_edt(outside))
    edge = np.clip((distance - MASK_GROWN_PX) / MASK_EDGE_PX, 0, 1)
    return (0.5 * (1 + np.cos(np.pi * edge))).astype(np.float32)


def cross_fsc(halves: Sequence[FinishedRun], latents: Sequence[Floats]) -> CrossFsc:
    """The maps of two halves at matched latents, each [K, L], compared."""
    count = len(latents[0])
    means = [_mean_map(half, points) for half, points in zip(halves, latents, strict=True)]
    mask = soft_mask(means[0] + means[1])
    unmasked, spectra = [], ([], [])
    for pair in progress(zip(*latents, strict=True), "maps of both halves", total=count, unit="conformation"):
        volumes = [half.volume(z) for half, z in zip(halves, pair, strict=True)]
        unmasked.append(fsc.correlate(*(fsc.spectrum(volume, shells="rounded") for volume in volumes)))
        for kept, volume in zip(spectra, volumes, strict=True):
            kept.append(fsc.spectrum(volume, mask, "rounded"))
    masked = np.array([[fsc.correlate(a, b) for b in spectra[1]] for a in spectra[0]])
    changes = [fsc.without_mean(of_half) for of_half in spectra]
    crossed = np.array([[fsc.correlate(a, b) * np.sqrt(a.power * b.power) for b in changes[1]] for a in changes[0]])
    powers = [np.array([change.power for change in of_half]) for of_half in changes]
    matched = np.arange(count)
    overall = np.sqrt(np.outer(*(power.sum(axis=1) for power in powers)))
    return CrossFsc(
        masked,
        np.array(unmasked),
        _ratio(crossed[matched, matched], np.sqrt(powers[0] * powers[1])),
        _ratio(crossed[matched, matched].sum(axis=0), np.sqrt(powers[0].sum(axis=0) * powers[1].sum(axis=0))),
        _ratio(crossed.sum(axis=2), overall),
        mask,
    )


def _mean_map(half: FinishedRun, latents: Floats) -> Floats:
    total = np.zeros((half.box,) * 3, dtype=np.float32)
    for z in progress(latents, "mean map of a half", unit="conformation"):
        total += half.volume(z)
    return total / np.float32(len(latents))


def _ratio(of: NDArray, by: NDArray) -> NDArray[np.float64]:
    """0 where there is nothing."""
    return np.divide(of, by, out=np.zeros_like(of), where=by > 0)


@dataclass(frozen=True)
class Seen:
    """A model at K matched conformations: centres [K, G, 3] Å, peak densities [K, G], widths [G] Å, parts [G]."""

    centres: Floats
    amplitudes: Floats
    widths: Floats
    parts: NDArray[np.int64]

    @classmethod
    def of(cls, run: FinishedRun, latents: Floats) -> "Seen":
        """A run at latents [K, L]."""
        return cls(*decode_in_batches(run, latents), run.widths, run.parts)

    @property
    def present(self) -> NDArray[np.bool_]:
        """[K, G]: Gaussians that are switched on."""
        height = np.abs(self.amplitudes)
        return height >= PRESENT * np.median(height, axis=1, keepdims=True)

    @property
    def moving(self) -> NDArray[np.bool_]:
        """[G]: whether most of the density of a Gaussian's part changes over the conformations (`agreement.variable_share`)."""
        weights = np.abs(self.amplitudes)
        share, weight = variable_share(self.centres, weights, self.widths), weights.mean(axis=0) + 1e-12
        moving = np.zeros(len(self.parts), dtype=bool)
        for part in np.unique(self.parts):
            members = self.parts == part
            moving[members] = np.average(share[members], weights=weight[members]) > MOSTLY
        return moving


def compare_parts(run: Seen, halves: Sequence[Seen]) -> dict:
    """Adjusted Rand indices (1 equal, 0 chance) of parts at the run's Gaussians: between the halves and of each with the run.

    `moving` compares only which Gaussians belong to parts that change by the models' own measure; None where a half has only
    one kind.
    """
    named, weights = [], np.abs(run.amplitudes)
    for half in halves:
        residues = Residues(half.centres, half.present, half.parts, [])
        named.append(truth_labels(run.centres, weights, residues, np.arange(len(run.centres))))
    moving = []
    for half, labels in zip(halves, named, strict=True):
        moving.append(np.isin(labels, half.parts[half.moving]))
    mass = (weights * run.widths**3).mean(axis=0)
    both = all(0 < flags.sum() < len(flags) for flags in moving)
    return {
        "between_halves": float(adjusted_rand_score(*named)),
        "with_run": [float(adjusted_rand_score(run.parts, labels)) for labels in named],
        "moving": float(adjusted_rand_score(*moving)) if both else None,
        "moving_share_of_mass": [float(mass[flags].sum() / mass.sum()) for flags in moving],
    }


def compare_motion(run: Seen, halves: Sequence[Seen]) -> dict:
    """Agreement of the displacements of two halves between all pairs of the K conformations, and for each part of the run.

    correlation   Σ w d1 · d2 / √(Σ w |d1|² Σ w |d2|²): 1 equal, 0 nothing in common; not centred, no motion is a finding too.
                  Wild motion as large as the bodies comes out at 0.2: what is far out came from further in, in both halves
    rms_a         of each half's displacements, Å;  difference_a: of d1 - d2
    """
    count, gaussians = run.amplitudes.shape
    mass = np.abs(run.amplitudes) * run.widths**3
    sums = np.zeros((5, gaussians))  # of weights, |d1|², |d2|², d1 · d2, |d1 - d2|²
    for i in range(count):
        moved = []
        for half in halves:
            there = np.flatnonzero(half.present[i])
            nearest = KDTree(half.centres[i, there]).query(run.centres[i], k=min(NEAREST, len(there)))[1]
            paths = (half.centres - half.centres[i]).astype(np.float64)
            near = there[np.reshape(nearest, (gaussians, -1))]
            moved.append(np.mean([paths[:, column] for column in near.T], axis=0))  # [K, G, 3]
        first, second = moved
        products = (first**2, second**2, first * second, (first - second) ** 2)
        sums += mass[i] * np.stack([np.full(gaussians, count - 1.0), *(p.sum(axis=(0, 2)) for p in products)])
    parts = [{"part": int(p), **_agreement(sums[:, run.parts == p].sum(axis=1))} for p in np.unique(run.parts)]
    return _agreement(sums.sum(axis=1)) | {"parts": parts}


def _agreement(sums: NDArray[np.float64]) -> dict:
    weight, one, two, product, difference = sums
    norm = np.sqrt(one * two)
    return {
        "correlation": float(product / norm) if norm > 0 else 0.0,
        "rms_a": [float(np.sqrt(square / weight)) for square in (one, two)],
        "difference_a": float(np.sqrt(difference / weight)),
    }
