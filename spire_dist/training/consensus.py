"""The homogeneous map: CTF-weighted back-projection of all particles in their given poses.

Every image's transform, centred by its shift, is a central section of the map's. Weighted least squares per Fourier voxel
gives V = Σ CTF·F / Σ CTF² (as RELION's and cryoDRGN's back-projection); sections are spread over eight neighbours of a
padded grid, and the map is divided by that kernel's transform. Two halves are kept apart for their FSC, which weights the
final map (Rosenthal & Henderson 2003, C_ref = √(2 FSC / (1 + FSC))).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from spire_dist.data.loader import BatchSource
from spire_dist.distributed.collectives import sum_to_first
from spire_dist.distributed.mesh import Mesh
from spire_dist.physics import kernels_cpu
from spire_dist.physics.ctf import frequency_grid, shift_phases
from spire_dist.progress import progress

BATCH = 256
ALONE = Mesh()
FLOOR = 0.05
"""Fourier voxels seen with less than this share of their shell's mean weight are damped."""


def back_project(
    source: BatchSource, padding: int = 2, mesh: Mesh = ALONE
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]] | None:
    """(map, two half maps), each [D, D, D], of all particles of a source; density per pixel length.

    Ranks share the particles; the first one gets the result, the others None.
    """
    box = source.store.box
    grid = padding * box
    sums = [(np.zeros((grid,) * 3, np.complex64), np.zeros((grid,) * 3, np.float32)) for _ in range(2)]
    frequencies = frequency_grid(box, 1.0)
    batches = range(mesh.rank * BATCH, source.store.count, mesh.world * BATCH)
    shown = progress(batches, "consensus", unit="batch") if mesh.rank == 0 else batches
    for start in shown:
        batch = source.batch(np.arange(start, min(start + BATCH, source.store.count)))
        images, ctf = batch.images, batch.ctf
        # Back by the shift, and by box // 2, so that the particle's centre is the origin of the phases.
        centring = shift_phases(-(batch.shifts_px + box // 2), *frequencies)
        numerators = (ctf * images * centring).numpy()
        weights = (ctf**2).numpy()
        rotations = batch.rotations.numpy()
        for half, (numerator, weight) in enumerate(sums):
            rows = slice(half, None, 2)
            kernels_cpu.insert_sections(
                numerators[rows], weights[rows], rotations[rows], float(padding), numerator, weight
            )
    for half in sums:
        for array in half:  # complex numbers as pairs
            sum_to_first(torch.from_numpy(array.view(np.float32)), mesh.world_group)
    if mesh.rank != 0:
        return None
    halves = [_invert(numerator, weight, box) for numerator, weight in sums]
    merged = _invert(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], box)
    return _weighted_by_fsc(merged, halves), halves


def _invert(numerator: NDArray[np.complex64], weight: NDArray[np.float32], box: int) -> NDArray[np.float32]:
    """Map [box]³ from the padded sums, whose origin is index grid // 2 and which hold one half of Fourier space."""
    grid = numerator.shape[0]
    numerator, weight = numerator + _point_mirror(numerator).conj(), weight + _point_mirror(weight)
    shells = np.minimum(_radii(grid), grid // 2)
    mean = np.bincount(shells.ravel(), weight.ravel()) / np.bincount(shells.ravel())
    floor = FLOOR * mean[shells].astype(np.float32) + np.float32(1e-6 * weight.max() + 1e-30)
    transform = np.where(shells < grid // 2, numerator / np.maximum(weight, floor), 0)
    full = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(transform)).real)
    start = grid // 2 - box // 2
    volume = full[(slice(start, start + box),) * 3]
    # Trilinear spreading multiplies the map by sinc² of the distance along each axis.
    taper = np.sinc((np.arange(box) - box // 2) / grid) ** 2
    return (volume / (taper[:, None, None] * taper[None, :, None] * taper[None, None, :])).astype(np.float32)


def _point_mirror(array: NDArray) -> NDArray:
    """array[-k] for an array whose zero frequency is at index side // 2."""
    return np.roll(array[::-1, ::-1, ::-1], 1 - array.shape[0] % 2, axis=(0, 1, 2))


def _radii(side: int) -> NDArray[np.int64]:
    """Rounded distance of every lattice point from index side // 2, [side]³."""
    axis = (np.arange(side) - side // 2) ** 2
    return np.rint(np.sqrt(axis[:, None, None] + axis[None, :, None] + axis[None, None, :])).astype(np.int64)


def _weighted_by_fsc(merged: NDArray[np.float32], halves: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The map with every shell multiplied by C_ref of the halves' FSC."""
    box = merged.shape[0]
    shells = np.minimum(_radii(box), box // 2).ravel()
    a, b, full = (np.fft.fftshift(np.fft.fftn(volume)).ravel() for volume in (*halves, merged))
    cross = np.bincount(shells, (a * b.conj()).real)
    power = np.sqrt(np.bincount(shells, np.abs(a) ** 2) * np.bincount(shells, np.abs(b) ** 2))
    fsc = np.clip(cross / np.maximum(power, 1e-30), 1e-3, 1)
    weighted = (full * np.sqrt(2 * fsc / (1 + fsc))[shells]).reshape(merged.shape)
    return np.fft.ifftn(np.fft.ifftshift(weighted)).real.astype(np.float32)
