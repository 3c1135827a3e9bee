"""Images out of Zarr 3 shards: whole chunks, or runs of images within one, read where they lie.

A shard is one file: its chunks, then for each of them offset and size (u64 pairs, little-endian; all ones for a chunk that is
not there), then the crc32c of those pairs. Knowing that, a chunk costs one read of the file system, straight into the
caller's array: an array library takes 2 to 60 times as long. Called by `spire_dist.data.store`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from spire_dist.errors import StoreError

Runs = NDArray[np.int64] | Sequence[tuple[int, int]]
NOT_THERE = 2**64 - 1
PLACED = "chunks_of_another_store"
"""Field of `images/zarr.json` in a view whose chunk i is chunk first + every · i of the shards it is linked to."""
CODECS = {("bytes",): False, ("bytes", "zstd"): True}
"""Codecs of a chunk, and whether it must be decompressed."""


@dataclass(frozen=True, eq=False)
class Shards:
    """The array `images` [N, D, D] of a store."""

    folder: Path
    count: int
    box: int
    dtype: np.dtype[Any]
    images_per_chunk: int
    images_per_shard: int
    compressed: bool
    first: int = 0
    every: int = 1
    """Chunk i of this array is chunk first + every · i of its files."""
    _indexes: dict[int, NDArray[np.uint64]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """The array whose zarr.json lies in `folder`. Raises KeyError or ValueError where that is not what prep writes."""
        about = json.loads((folder / "zarr.json").read_text())
        [sharding] = about["codecs"]
        inner = sharding["configuration"]
        names = tuple(codec["name"] for codec in inner["codecs"])
        if names not in CODECS or inner["index_location"] != "end":
            raise ValueError(f"images in codecs {', '.join(names)}, index at the {inner['index_location']}")
        count, box, _ = about["shape"]
        placed = about.get(PLACED, {"first": 0, "every": 1})
        return cls(
            folder=folder,
            count=count,
            box=box,
            dtype=np.dtype(about["data_type"]).newbyteorder("<"),
            images_per_chunk=inner["chunk_shape"][0],
            images_per_shard=about["chunk_grid"]["configuration"]["chunk_shape"][0],
            compressed=CODECS[names],
            first=placed["first"],
            every=placed["every"],
        )

    def path(self, shard: int) -> Path:
        """File of the shard that holds images `shard * images_per_shard` and on."""
        return self.folder / "c" / str(shard) / "0" / "0"

    def read(self, runs: Runs, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Images [n, D, D] as they are stored, of `runs` [R, 2] (first image, number of images), one after the other.

        A run lies within one chunk; runs of one shard that follow each other share an opened file. Fills `out` where it is
        given. Raises StoreError naming a shard that is damaged or missing.
        """
        total = int(np.sum(runs, axis=0)[1]) if len(runs) else 0
        images = np.empty((total, self.box, self.box), self.dtype) if out is None else out[:total]
        done = 0
        for shard, of_shard in self._by_shard(runs):
            with self._opened(shard) as (file, index):
                for first, count in of_shard:
                    self._fill(file, index, first, images[done : done + count])
                    done += count
        return images

    def announce(self, runs: Runs) -> None:
        """Let the system fetch the chunks of runs side by side, so that reading them one by one waits less for a disk."""
        for shard, of_shard in self._by_shard(runs):
            with self._opened(shard) as (file, index):
                for first, _ in of_shard:
                    offset, size = map(int, index[first // self.images_per_chunk])
                    if offset != NOT_THERE and hasattr(os, "posix_fadvise"):  # no such call on a Mac
                        os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)

    def _by_shard(self, runs: Runs) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Runs that follow each other and are of one shard, their first images counted from its beginning."""
        placed = ((self._place(int(first)), int(count)) for first, count in runs)
        for shard, of_shard in groupby(placed, key=lambda run: run[0] // self.images_per_shard):
            yield shard, [(first % self.images_per_shard, count) for first, count in of_shard]

    def _place(self, image: int) -> int:
        """Where an image of this array lies in the files."""
        chunk, within = divmod(image, self.images_per_chunk)
        return (self.first + self.every * chunk) * self.images_per_chunk + within

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(file, offset and size of each chunk) of a shard; what goes wrong inside names the shard."""
        path = self.path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                if shard not in self._indexes:
                    self._indexes[shard] = self._index(file)
                yield file, self._indexes[shard]
            finally:
                os.close(file)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: zstd
            raise StoreError(f"{path}: damaged shard ({error}); `spire-dist verify` checks the whole store") from error

    def _index(self, file: int) -> NDArray[np.uint64]:
        """Offset and size [chunks, 2] of a shard's chunks, checked once against their checksum."""
        chunks = self.images_per_shard // self.images_per_chunk
        size = 16 * chunks + 4
        tail = os.pread(file, size, max(os.fstat(file).st_size - size, 0))
        if len(tail) != size or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise ValueError("its index does not match its checksum")
        return np.frombuffer(tail[:-4], dtype="<u8").reshape(chunks, 2)

    def _fill(self, file: int, index: NDArray[np.uint64], first: int, images: NDArray[Any]) -> None:
        """Fill `images` [n, D, D] from image `first` of a shard on, all of one chunk."""
        chunk, within = divmod(first, self.images_per_chunk)
        offset, size = map(int, index[chunk])
        image_bytes = self.box**2 * self.dtype.itemsize
        if offset == NOT_THERE:
            images[:] = 0
        elif self.compressed:
            self._decompress(os.pread(file, size, offset), within, images)
        elif size != self.images_per_chunk * image_bytes:
            raise ValueError(f"chunk {chunk} has {size} bytes, not {self.images_per_chunk * image_bytes}")
        else:
            _read_into(file, offset + within * image_bytes, images)

    def _decompress(self, raw: bytes, within: int, images: NDArray[Any]) -> None:
        from numcodecs.zstd import decompress  # only compact stores need it

        if len(images) == self.images_per_chunk:
            decompress(raw, images)
        else:
            chunk = np.empty((self.images_per_chunk, self.box, self.box), self.dtype)
            decompress(raw, chunk)
            images[:] = chunk[within : within + len(images)]


def _read_into(file: int, offset: int, array: NDArray[Any]) -> None:
    """Fill a contiguous array with the bytes of a file from `offset` on."""
    left = array.view(np.uint8).data.cast("B")
    while left.nbytes:
        done = os.preadv(file, [left], offset)
        if done == 0:
            raise ValueError(f"ends {left.nbytes} bytes early")
        left, offset = left[done:], offset + done
