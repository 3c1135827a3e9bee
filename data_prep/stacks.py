"""MRC stacks of particle images: header checked against the file, slices read through a memory map.

Called by `plan.py` and, for every image, by `shards.py`.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import mrcfile.utils
import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import SourceError


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
