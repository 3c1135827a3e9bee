"""Particle images: found, read from .mrc/.mrcs stacks, brought to one box and pixel size, normalised. Numpy only.

Called by `convert.py` and `checks.py`. Every function is deterministic for the same batch of images.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mrcfile
import mrcfile.utils
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spire_dist.errors import SourceError

PARENTS_SEARCHED = 4
"""A STAR file's paths are relative to its project, which is a few folders above (Refine3D/job012/run_data.star)."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One .mrc/.mrcs file whose header was checked against its size."""

    path: Path
    count: int
    box: int
    """Side of its square images, px."""
    dtype: str
    offset: int
    """Byte where the first image starts."""
    bytes: int
    """Size of the file."""
    header_pixel_size: float
    """Å/px; 0 or 1 in many files that never set it, so the particle table is believed instead."""


def find_stack(name: str, source: Path, datadir: Path | None) -> Path:
    """The stack called `name` in `source`.

    Looked for under `datadir` (with its folders, then by its bare name) if given; else at its absolute path, beside the
    source and in the folders above it.
    """
    parents = list(source.absolute().parents)[:PARENTS_SEARCHED]
    candidates = [datadir / name, datadir / Path(name).name] if datadir else [parent / name for parent in parents]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    where = f"in {datadir}" if datadir else f"beside {source.name} or in the {len(parents)} folders above it"
    raise SourceError(f"{source}: stack {name} not found {where}; give the folder that holds it as datadir")


def open_stack(path: Path) -> Stack:
    """Read a stack's header and check it against the file's size."""
    if path.suffix in (".gz", ".bz2"):
        raise SourceError(f"{path}: compressed stacks cannot be read in place; unpack it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # older programs leave out the MAP word; harmless
            with mrcfile.open(path, mode="r", permissive=True, header_only=True) as mrc:
                header = mrc.header
                assert header is not None
                dtype = mrcfile.utils.data_dtype_from_header(header)
                width, height, count = int(header.nx), int(header.ny), int(header.nz)
                pixel_size, offset = float(mrc.voxel_size.x), 1024 + int(header.nsymbt)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not an MRC stack ({' '.join(str(error).split())})") from error
    if not (width == height > 0 and count > 0 and offset >= 1024):
        raise SourceError(
            f"{path}: images of {width} × {height} px, {count} of them; square particle images are needed"
        )
    size, needed = path.stat().st_size, offset + count * width * height * dtype.itemsize
    if size < needed:
        whole = max(size - offset, 0) // (width * height * dtype.itemsize)
        raise SourceError(f"{path}: truncated: {size} bytes hold {whole} of the {count} images its header promises")
    return Stack(
        path=path,
        count=count,
        box=width,
        dtype=dtype.str,
        offset=offset,
        bytes=size,
        header_pixel_size=pixel_size,
    )


def read_slices(stack: Stack, slices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images `slices` [n] (from 0) of a stack as float32 [n, box, box], through a memory map."""
    shape = (stack.count, stack.box, stack.box)
    try:
        mapped = np.memmap(stack.path, dtype=stack.dtype, mode="r", offset=stack.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise SourceError(f"{stack.path}: changed since it was first read ({error})") from error
    images = np.stack([np.asarray(mapped[index], dtype=np.float32) for index in slices])
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2)))
    if bad.size:
        raise SourceError(f"{stack.path}: image {slices[bad[0]] + 1} has pixels that are not finite numbers")
    return images


@cache
def resampling_matrix(box_in: int, box_out: int, span: float) -> NDArray[np.float32]:
    """Matrix A [box_out, box_in] with `A @ image @ A.T` the image on a coarser grid, its centre (index D // 2) kept.

    `span` is the side of the output in input pixels. With span = box_in this is Fourier cropping: the band-limited
    interpolation of the samples, without frequencies beyond the new Nyquist. A smaller span also crops in real space,
    to any fraction of a pixel, so that images of several pixel sizes can share one. Values keep their scale (a constant
    stays itself); the two Nyquist terms of an even grid are averaged, which is what keeps the result real.
    """
    assert box_out <= span <= box_in, "resampling only ever makes grids coarser and fields of view smaller"
    positions = (np.arange(box_out) - box_out // 2) * (span / box_out) + box_in // 2  # in input pixels
    distances = positions[:, None] - np.arange(box_in)[None, :]
    matrix = np.zeros((box_out, box_in))
    nyquist_out = box_in * box_out / span / 2  # in cycles per input box
    for k in range(box_in // 2 + 1):
        if k > nyquist_out + 1e-6:
            break
        at_an_end = k == 0 or 2 * k == box_in or abs(k - nyquist_out) < 1e-6
        weight = 1.0 if at_an_end else 2.0  # 2: k and -k
        matrix += weight * np.cos(2 * np.pi * k / box_in * distances)
    return (matrix / box_in).astype(np.float32)


def resample(images: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply `resampling_matrix` to images [n, box_in, box_in], giving [n, box_out, box_out]."""
    if matrix.shape[0] == matrix.shape[1]:  # same grid; a real-space crop by less than a pixel is never asked for
        return images
    return np.asarray(matrix @ (images @ matrix.T), dtype=np.float32)


def background_mask(box: int, radius_px: float) -> NDArray[np.bool_]:
    """[box, box], true outside the circle of `radius_px` around index box // 2."""
    axis = np.arange(box) - box // 2
    return axis[:, None] ** 2 + axis[None, :] ** 2 > radius_px**2


def background_statistics(
    images: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation [n] of each image's background, the pixels of `mask`."""
    background = images[:, mask].astype(np.float64)
    return background.mean(axis=1).astype(np.float32), background.std(axis=1).astype(np.float32)


def centre_contrast(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """How much brighter [n] the centre of each image is than its surroundings (scale of the images' noise).

    The weight is a Gaussian of 0.12 of the box, so only frequencies well below the first zero of any usual CTF count.
    There the CTF in our sign is positive (the amplitude contrast at 0, rising with underfocus), so that no phase needs
    flipping: bright-protein images have a positive contrast, whatever their defocus.
    """
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    weight = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (0.12 * box) ** 2))
    weight -= weight.mean()
    weight /= np.linalg.norm(weight)
    return np.asarray(np.tensordot(images.astype(np.float64), weight, axes=2), dtype=np.float64)


def protein_sign(contrasts: NDArray[np.float64]) -> int:
    """+1 where `centre_contrast` of many images says bright protein, -1 for dark, 0 where they cannot tell.

    They tell when a mean of zero has a chance below 1e-4 (t-test over the images).
    """
    if len(contrasts) < 2 or not np.any(contrasts != contrasts[0]):
        return 0
    chance = float(np.asarray(stats.ttest_1samp(contrasts, 0.0))[1])
    return int(np.sign(contrasts.mean())) if chance < 1e-4 else 0
