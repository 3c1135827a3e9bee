"""Where a table's latents start: at the coordinates of particles in a linear model of their maps.

The map of a particle is V_0 + Σ_k z_k V_k with z of a normal distribution: probabilistic principal components (Tipping & Bishop
1999), of maps as in 3DVA (Punjani & Fleet 2021). An image's transform is a central section of its map's, so, given the maps, z
of an image has a closed form, and given all z the V of a Fourier voxel are the solution of a small system: expectation
maximisation takes a few rounds, and no particle can be caught where it started. Only the innermost frequencies are used, which
all that moves far changes most; a map beyond them cannot be had from such a model, but who resembles whom can.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.data.loader import Batch, BatchSource
from spire_dist.distributed.collectives import everyones, sum_over
from spire_dist.distributed.mesh import Mesh
from spire_dist.physics.ctf import frequency_grid, shift_phases
from spire_dist.progress import progress

RINGS = 12
"""Frequencies used, in units of 1 / box: those of a particle of half the box that are coarser than a twelfth of it."""
PADDING = 2
"""Oversampling of Fourier space; a section takes the nearest voxel."""
MASK = 0.85
"""Radius of the sphere that holds the molecule, of half the box."""
MOST = 8
"""Components at most."""
FITTED = 16_384
"""Particles at most that the maps are fitted to, whole chunks evenly spread; the latents of all follow from these."""
ROUNDS = 7
START = 0.1
"""Size of the random components at the start, of the mean map."""
FLOOR = 0.05
"""What damps a voxel's system, of the mean weight of a voxel."""
BATCH = 256


@dataclass(frozen=True)
class Sections:
    """B images as P coefficients each, noise of variance one, and where they lie in a map's half of Fourier space."""

    values: Tensor
    """[B, P], complex, phases about the particle's centre."""
    ctf: Tensor
    """[B, P]"""
    voxels: Tensor
    """[B, P]"""
    mirrored: Tensor
    """[B, P]: it is the complex conjugate that lies there."""

    def split(self, size: int) -> Iterator["Sections"]:
        """The same, some images at a time."""
        yield from (
            Sections(*part) for part in zip(*(getattr(self, f.name).split(size) for f in fields(self)), strict=True)
        )


def rings(box: int) -> int:
    """Frequencies used of images of `box` pixels."""
    return min(RINGS, box // 2 - 1)


def side(box: int) -> int:
    """Side of the padded Fourier grid, an odd number; it holds the sections of all orientations."""
    return 2 * (PADDING * rings(box) + 1) + 1


def cut_sections(batch: Batch) -> Sections:
    """The innermost coefficients of a batch's images, without the mean of an image, which says nothing."""
    box, most = batch.images.shape[-2], rings(batch.images.shape[-2])
    x, y = (grid.round().long() for grid in frequency_grid(box, 1 / box))
    inside = (x**2 + y**2 <= most**2) & ((x > 0) | (y > 0))  # each pair of k and -k once
    centring = shift_phases(-(batch.shifts_px + box // 2), *(grid[inside][None] for grid in frequency_grid(box, 1.0)))
    planar = torch.stack([x[inside], y[inside]], dim=1).float()
    points = (PADDING * planar) @ batch.rotations[:, :2]  # Rᵀ k
    mirrored = points[..., 2] < 0
    across, up, depth = torch.where(mirrored[..., None], -points, points).round().long().unbind(-1)
    grid = side(box)
    voxels = ((up % grid) * grid + across % grid) * (grid // 2 + 1) + depth
    return Sections(batch.images[:, inside] * centring[:, 0] / box, batch.ctf[:, inside], voxels, mirrored)


def coordinates(sections: Sections, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, K] and covariance [B, K, K] of the images' z, by maps [V, K + 1] of the half grid, the mean map first."""
    seen = maps[sections.voxels]
    seen = torch.where(sections.mirrored[..., None], seen.conj(), seen) * sections.ctf[..., None]
    mean, *components = torch.view_as_real(seen).transpose(2, 3).flatten(1, 2).split([1, maps.shape[1] - 1], dim=2)
    (components,) = components
    residuals = torch.view_as_real(sections.values).flatten(1) - mean[..., 0]
    # a complex coefficient of variance one has half of it in each of its numbers
    precision = 2 * components.transpose(1, 2) @ components + torch.eye(components.shape[2])
    covariance = torch.linalg.inv(precision)
    pull = 2 * components.transpose(1, 2) @ residuals[..., None]
    return (covariance @ pull)[..., 0], covariance


class Sums:
    """What the images say of every voxel: numerators [V, K + 1], and the upper triangles of their systems' matrices."""

    def __init__(self, voxels: int, components: int) -> None:
        count = components + 1
        self.upper = torch.triu_indices(count, count)
        self.numerators = torch.zeros(voxels, count, 2)
        self.weights = torch.zeros(voxels, self.upper.shape[1])

    def add(self, sections: Sections, z: Tensor, covariance: Tensor) -> None:
        """Images whose z have this mean [B, K] and covariance [B, K, K]."""
        ones = torch.cat([z.new_ones(len(z), 1), z], dim=1)
        moments = ones[:, :, None] * ones[:, None, :]
        moments[:, 1:, 1:] += covariance
        values = torch.where(sections.mirrored, sections.values.conj(), sections.values) * sections.ctf
        pulls = torch.view_as_real(values[..., None] * ones[:, None, :])
        loads = sections.ctf.square()[..., None] * moments[:, None, self.upper[0], self.upper[1]]
        rows = sections.voxels.flatten()
        self.numerators.index_add_(0, rows, pulls.flatten(0, 1))
        self.weights.index_add_(0, rows, loads.flatten(0, 1))

    def maps(self, mesh: Mesh) -> Tensor:
        """Maps [V, K + 1] that explain all ranks' images best; all ranks call this together."""
        sum_over([self.numerators, self.weights], mesh.world_group)
        count, seen = self.numerators.shape[1], self.weights[:, 0] > 0
        weights = self.weights[seen]
        systems = (FLOOR * weights[:, 0].mean() + 1e-6) * torch.eye(count).repeat(len(weights), 1, 1)
        systems[:, self.upper[0], self.upper[1]] += weights
        systems[:, self.upper[1], self.upper[0]] = systems[:, self.upper[0], self.upper[1]]
        maps = torch.zeros_like(self.numerators)
        maps[seen] = torch.linalg.solve(systems, self.numerators[seen])
        return torch.view_as_complex(maps)


class Space:
    """A padded grid in real space and its half of Fourier space, the origin first along each axis, and the molecule in it."""

    def __init__(self, box: int) -> None:
        self.side = side(box)
        axis = torch.fft.fftfreq(self.side, d=1 / self.side)
        radii = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
        self.inside = (radii < MASK * self.side / (2 * PADDING)).float()[..., None]
        self.voxels = self.side**2 * (self.side // 2 + 1)

    def confined(self, maps: Tensor) -> Tensor:
        """Maps [V, C] of the half grid without what lies outside of the sphere."""
        half = maps.view(self.side, self.side, self.side // 2 + 1, -1)
        return self.transform(torch.fft.irfftn(half, s=(self.side,) * 3, dim=(0, 1, 2)))

    def transform(self, real: Tensor) -> Tensor:
        """[V, C] of maps [side, side, side, C], of which what is inside counts."""
        return torch.fft.rfftn(real * self.inside, dim=(0, 1, 2)).flatten(0, 2)


def fit_maps(own: Sections, box: int, components: int, seed: int, mesh: Mesh) -> Tensor:
    """Maps [V, K + 1] fitted to the images that the ranks have; all call this together and get the same."""
    space = Space(box)
    maps = torch.zeros(space.voxels, components + 1, dtype=torch.complex64)
    rounds = range(ROUNDS + 1)
    for number in progress(rounds, "linear model", unit="round") if mesh.rank == 0 else rounds:
        sums = Sums(space.voxels, components)
        for part in own.split(BATCH):
            sums.add(part, *coordinates(part, maps))  # of components that are zero, z is too
        maps = space.confined(sums.maps(mesh))
        if number == 0:
            noise = torch.randn((space.side,) * 3 + (components,), generator=torch.Generator().manual_seed(seed))
            mean = torch.fft.irfftn(maps[:, 0].view(space.side, space.side, -1), s=(space.side,) * 3)
            maps[:, 1:] = space.transform(START * mean.abs().max() * noise)
    return maps


def linear_latents(source: BatchSource, dimension: int, seed: int, mesh: Mesh) -> NDArray[np.float32]:
    """Coordinates [N, K] of all particles in store order, K = `dimension` but at most MOST, with a standard deviation of one.

    All ranks share the work and get the whole.
    """
    count, components = source.store.count, min(dimension, MOST)
    fitted = fitted_rows(count, source.store.images_per_chunk)[mesh.rank :: mesh.world]
    parts = [cut_sections(source.batch(rows)) for rows in _runs(fitted)]
    own = Sections(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sections)))
    maps = fit_maps(own, source.store.box, components, seed, mesh)
    run = -(-count // mesh.world)
    mine = np.arange(count)[mesh.rank * run : (mesh.rank + 1) * run]
    found = [coordinates(cut_sections(source.batch(rows)), maps)[0].numpy() for rows in _runs(mine)]
    whole = np.concatenate(everyones(np.concatenate(found), mesh.world_group))
    return (whole / max(float(whole.std()), 1e-6)).astype(np.float32)


def fitted_rows(count: int, per_chunk: int) -> NDArray[np.int64]:
    """Of `count` particles those that the maps are fitted to, ascending: at most FITTED, chunks evenly spread."""
    chunks = -(-count // per_chunk)
    taken = np.linspace(0, chunks - 1, min(chunks, max(1, FITTED // per_chunk))).round().astype(np.int64)
    rows = (taken[:, None] * per_chunk + np.arange(per_chunk)).ravel()
    return rows[rows < count]


def _runs(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """At least one, perhaps of no row."""
    return np.split(rows, range(BATCH, len(rows), BATCH))
