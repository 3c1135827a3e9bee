"""MRC stacks of particle images: header checked against the file, images read as they lie in it.

Called for every stack by `plan.py`, and for every run of images by the tasks that write shards.
"""

import errno
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import mrcfile.utils
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import ArrayLike, NDArray

from spire_dist.errors import SourceError

STACK_SUFFIXES = (".mrcs", ".mrc")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
OTHER_MODES = {3: "complex integers", 4: "complex numbers", 101: "4-bit integers"}
"""Modes of the format that are no images of real numbers in whole bytes."""
LARGEST_SIDE = 65535
"""px; a header that states more is of the other byte order, or of no MRC file."""
BIG_STAMP = 0x11
"""First byte of the machine stamp of a file whose numbers start with their highest byte."""
VOLUME_STACK = 401
"""`ispg` from which on a file is a stack of volumes, each of `mz` sections."""
READ_ONCE = 0x80 if sys.platform == "linux" else 0
"""RWF_DONTCACHE of Linux 6.14: what the system's cache does not hold already is not kept there after it was read."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One .mrc/.mrcs file whose header was checked against its size."""

    path: Path
    count: int
    box: int
    """Side of its square images, px."""
    dtype: str
    """numpy's name of a pixel's type with its byte order, such as "<f4"."""
    offset: int
    """Byte where the first image starts."""
    bytes: int
    """Size of the file."""
    header_pixel_size: float
    """Å/px; 0 or 1 in many files that never set it, so the particle table is believed instead."""


def open_stack(path: Path) -> Stack:
    """Read a stack's header, its first 1,024 bytes, and check it against the file's size.

    Modes 0 (signed, as mrcfile reads it), 1, 2, 6 and 12, either byte order, extended headers of any kind. A file longer
    than its header says is taken at its word. Raises SourceError with the reason for all else.
    """
    if path.suffix.lower() in COMPRESSED:
        raise SourceError(f"{path}: compressed stacks cannot be read in place; unpack it")
    try:
        with open(path, "rb", buffering=0) as file:
            head, size = file.read(HEADER_DTYPE.itemsize), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(head) < HEADER_DTYPE.itemsize:
        raise SourceError(f"{path}: not an MRC stack: {size} bytes, its header alone has {HEADER_DTYPE.itemsize}")
    header = _in_byte_order(head)
    width, height, count, mode, extended = (int(header[name]) for name in ("nx", "ny", "nz", "mode", "nsymbt"))
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE and count > 0):
        raise SourceError(f"{path}: not an MRC stack: its header says {count} images of {width} × {height} px")
    dtype = _pixel_type(path, mode).newbyteorder(header.dtype["mode"].byteorder)
    if width != height:
        raise SourceError(f"{path}: images of {width} × {height} px; square particle images are needed")
    axes = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if axes not in ((1, 2, 3), (0, 0, 0)):  # programs that leave the field out write zeros
        raise SourceError(f"{path}: its axes are stored in the order {axes} (mapc, mapr, maps); expected (1, 2, 3)")
    if header["ispg"] >= VOLUME_STACK and header["mz"] > 1:
        sections = f"volumes of {header['mz']} sections"
        raise SourceError(f"{path}: a stack of {sections} (ispg {header['ispg']}); 2-D images are needed")
    if extended < 0:
        raise SourceError(f"{path}: not an MRC stack: an extended header of {extended} bytes (nsymbt)")
    offset, image_bytes = HEADER_DTYPE.itemsize + extended, width * height * dtype.itemsize
    if size < offset + count * image_bytes:
        whole = max(size - offset, 0) // image_bytes
        raise SourceError(f"{path}: truncated: {size} bytes hold {whole} of the {count} images its header promises")
    length_a, samples = float(header["cella"]["x"]), int(header["mx"])
    pixel_size = length_a / samples if samples > 0 and math.isfinite(length_a) else 0.0
    return Stack(
        path=path,
        count=count,
        box=width,
        dtype=dtype.str,
        offset=offset,
        bytes=size,
        header_pixel_size=max(pixel_size, 0.0),
    )


def read_slices(stack: Stack, slices: NDArray[np.integer]) -> NDArray[np.float32]:
    """Images `slices` [n] (from 0), anywhere in a stack, as float32 [n, box, box]; neighbours are read in one piece.

    No memory map, so that pages of the file are not counted as memory of this process. Raises SourceError where the stack
    is not what it was when its header was read, and for pixels that are not finite numbers.
    """
    images = np.empty((len(slices), stack.box, stack.box), dtype=stack.dtype)
    runs = np.split(np.arange(len(slices)), np.flatnonzero(np.diff(slices) != 1) + 1) if len(slices) else []
    try:
        with open(stack.path, "rb", buffering=0) as file:
            for run in runs:
                start, part = stack.offset + int(slices[run[0]]) * images[0].nbytes, images[run[0] : run[-1] + 1]
                if _read_into(file.fileno(), start, part.view(np.uint8).data.cast("B")) < part.nbytes:
                    last = slices[run[-1]] + 1
                    raise SourceError(f"{stack.path}: became shorter since it was first read: no image {last}")
    except OSError as error:
        raise SourceError(f"{stack.path}: cannot be read any more ({error.strerror or error})") from error
    return _finite_images(stack, slices, images)


def _read_into(file: int, start: int, buffer: memoryview) -> int:
    """Bytes read; less than the buffer holds only at the end of the file (one call reads at most 2 GiB)."""
    done, flags = 0, READ_ONCE
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], start + done, flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            flags = 0  # an older system, or a file system without it
            continue
        if not count:
            break
        done += count
    return done


def _finite_images(stack: Stack, slices: ArrayLike, images: NDArray[np.generic]) -> NDArray[np.float32]:
    """`images` [n, box, box], read from `slices` [n] of a stack, as float32; refused where one has NaN or infinities."""
    values = images.astype(np.float32, copy=False)
    # A sum is finite unless a pixel is not (or pixels near the end of the range add up to more than it holds).
    with np.errstate(over="ignore", invalid="ignore"):
        suspect = np.flatnonzero(~np.isfinite(values.sum(axis=(1, 2))))
    bad = [i for i in suspect if not np.isfinite(values[i]).all()]
    if bad:
        number = int(np.asarray(slices)[bad[0]]) + 1
        raise SourceError(f"{stack.path}: image {number} has pixels that are not finite numbers")
    return values


def _in_byte_order(head: bytes) -> np.void:
    """The header read in its byte order: as its machine stamp says, unless only the other order makes sense."""
    little = np.frombuffer(head, HEADER_DTYPE.newbyteorder("<"))[0]
    big = np.frombuffer(head, HEADER_DTYPE.newbyteorder(">"))[0]
    orders = (big, little) if little["machst"][0] == BIG_STAMP else (little, big)
    for header in orders:
        sides = int(header["nx"]), int(header["ny"])
        if all(0 < side <= LARGEST_SIDE for side in sides) and 0 <= header["mode"] < 2**16:
            return header
    return orders[0]


def _pixel_type(path: Path, mode: int) -> np.dtype:
    if mode in OTHER_MODES:
        raise SourceError(f"{path}: mode {mode}, {OTHER_MODES[mode]}; images of mode 0, 1, 2, 6 or 12 are read")
    try:
        return mrcfile.utils.dtype_from_mode(mode)
    except ValueError as error:
        raise SourceError(f"{path}: unknown mode {mode}; images of mode 0, 1, 2, 6 or 12 are read") from error
