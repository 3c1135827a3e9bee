"""Reads a particle store (`spire_dist.schema`): pose, CTF and labels in memory, images from disk on request.

Called by the loader, evaluation, export and `data_prep.checks`; imports neither torch nor anything that writes a store.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from spire_dist.errors import StoreError
from spire_dist.schema import ARRAYS, CTF_COLUMNS, MANIFEST_NAME, OPTIONAL_ARRAYS, SCHEMA_VERSION

SHARDS = "images/c/"
"""What the names of all image files begin with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParticleStore:
    """A finished store of N particles; rows are in store order, `source_index` leads back to the input's rows."""

    path: Path
    box: int
    """Image side, px."""
    pixel_size: float
    """Å/px."""
    count: int
    """N."""
    rotations: NDArray[np.float32]
    """[N, 3, 3], r_image = R @ r_volume; identities where `has_poses` is false."""
    shifts: NDArray[np.float32]
    """[N, 2], Å, (x, y); a point c lands at (R c)[:2] + t."""
    ctf: NDArray[np.float32]
    """[N, 9], columns `schema.CTF_COLUMNS`."""
    optics_group: NDArray[np.int32]
    """[N], index into `attributes["optics_groups"]`."""
    source: NDArray[np.int32]
    """[N], index into `sources`."""
    source_index: NDArray[np.int64]
    """[N], row of the particle in its particle file, from 0; shared by the tilts of one particle."""
    stack: NDArray[np.int32]
    """[N], entry of stacks.json."""
    slice: NDArray[np.int32]
    """[N], image in that stack, from 0."""
    scale: NDArray[np.float32] | None
    """[N], what the 8-bit images of a compact store are multiplied by."""
    uid: NDArray[np.uint64] | None
    """[N], cryoSPARC's number of each particle."""
    label: NDArray[np.int32] | None
    """[N], the true state where it is known."""
    attributes: dict[str, Any]
    """What prep recorded: options, inputs, sign, normalisation, optics groups."""
    fingerprint: str
    """Changes when an image, pose, CTF or the pixel size does; not when the store or its input is moved."""
    images_per_shard: int
    images_per_chunk: int
    image_dtype: str
    """float16, float32 or int8, on disk."""

    @classmethod
    def open(cls, path: str | Path) -> "ParticleStore":
        """Open a finished store.

        Raises `StoreError` where nothing is there, the store is unfinished or another version of this program wrote it.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():  # zarr would take a missing piece of a table for zeros
            if not name.startswith(SHARDS) and not _has_size(path / name, entry["bytes"]):
                raise StoreError(f"{path / name}: missing or damaged; `spire-dist verify` checks the whole store")
        try:
            group = zarr.open_group(path, mode="r")
            return cls._from_group(path, group, manifest["fingerprint"])
        except (KeyError, OSError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{path}: damaged ({reason}); `spire-dist verify` checks the whole store") from error

    @classmethod
    def _from_group(cls, path: Path, group: zarr.Group, fingerprint: str) -> "ParticleStore":
        attributes: dict[str, Any] = group.attrs.asdict()
        if tuple(attributes["ctf_columns"]) != CTF_COLUMNS:
            raise ValueError(f"CTF columns {attributes['ctf_columns']}, expected {list(CTF_COLUMNS)}")
        images = _array(group, "images")
        count, box, _ = images.shape
        return cls(
            path=path,
            box=box,
            pixel_size=float(attributes["pixel_size_a"]),
            count=count,
            **{name: map_table(path, name) for name in ARRAYS if name not in ("images", "input_pixel_size")},
            **{name: map_table(path, name) if name in group else None for name in OPTIONAL_ARRAYS},
            attributes=attributes,
            fingerprint=fingerprint,
            images_per_shard=(images.shards or images.chunks)[0],
            images_per_chunk=images.chunks[0],
            image_dtype=str(images.dtype),
        )

    @property
    def sources(self) -> list[Path]:
        """The particle files, as they were named."""
        return [Path(entry["path"]) for entry in self.attributes["inputs"] if entry["role"] == "particles"]

    @property
    def has_poses(self) -> bool:
        """False for a store made with missing poses allowed: good for looking at, not for training."""
        return bool(self.attributes["has_poses"])

    def __len__(self) -> int:
        return self.count

    def read(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Images of `rows` (any order, repeats allowed) as float32 [len(rows), D, D].

        Neighbouring rows are read in one piece, so a batch made of whole chunks costs one read per chunk. Shards are
        not compressed, so their bytes are read in place: far faster for scattered rows than an array library.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        images = np.empty((rows.size, self.box, self.box), dtype=np.float32)
        if rows.size == 0:
            return images
        if rows.min() < 0 or rows.max() >= self.count:
            raise IndexError(f"{self.path}: rows {rows.min()}..{rows.max()} asked of {self.count} particles")
        order = np.argsort(rows, kind="stable")
        shards = rows[order] // self.images_per_shard
        for positions in np.split(order, np.flatnonzero(np.diff(shards)) + 1):
            self._read_shard(rows[positions], images, positions)
        return images

    def shard_path(self, shard: int) -> Path:
        """File of the shard that holds rows `shard * images_per_shard` and on."""
        return self.path / "images" / "c" / str(shard) / "0" / "0"

    def _read_shard(self, rows: NDArray[np.int64], images: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """Fill `images[positions]` with `rows`, ascending and all of one shard."""
        path = self.shard_path(int(rows[0]) // self.images_per_shard)
        dtype = np.dtype(self.image_dtype).newbyteorder("<")
        pixels = self.box * self.box
        try:
            with open(path, "rb") as file:
                offsets = self._chunk_offsets(file)
                # A run is a stretch of consecutive rows within one chunk.
                new_run = (np.diff(rows) != 1) | (rows[1:] % self.images_per_chunk == 0)
                for run in np.split(np.arange(rows.size), np.flatnonzero(new_run) + 1):
                    chunk, within = divmod(int(rows[run[0]]) % self.images_per_shard, self.images_per_chunk)
                    file.seek(int(offsets[chunk]) + within * pixels * dtype.itemsize)
                    values = np.fromfile(file, dtype=dtype, count=run.size * pixels)
                    images[positions[run]] = values.reshape(run.size, self.box, self.box)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: damaged shard ({error}); `spire-dist verify` checks the whole store") from error

    def _chunk_offsets(self, shard: BinaryIO) -> NDArray[np.uint64]:
        """Where each chunk of a shard starts (Zarr 3 sharding: the file ends with u64 pairs and a crc)."""
        chunks = self.images_per_shard // self.images_per_chunk
        shard.seek(-(16 * chunks + 4), 2)
        return np.frombuffer(shard.read(16 * chunks), dtype="<u8").reshape(chunks, 2)[:, 0]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, whose presence says that the store is finished: schema version, fingerprint, files with hashes."""
    if not (path / "zarr.json").is_file():
        raise StoreError(f"{path}: not a particle store; `spire-dist prep` makes one from a STAR or .cs file")
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text())
    except FileNotFoundError:
        raise StoreError(
            f"{path}: unfinished store; run the same `spire-dist prep` command again to finish it"
        ) from None
    except json.JSONDecodeError as error:
        raise StoreError(f"{path / MANIFEST_NAME}: damaged ({error}); delete it and run prep again") from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise StoreError(f"{path}: store version {found}, this program reads {SCHEMA_VERSION}; make the store again")
    return manifest


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def map_table(path: Path, name: str) -> NDArray[Any]:
    """The array `name` of a store, images apart, mapped into memory: it is one uncompressed chunk."""
    description = json.loads((path / name / "zarr.json").read_text())
    shape = tuple(description["shape"])
    if description["chunk_grid"]["configuration"]["chunk_shape"] != description["shape"]:
        raise ValueError(f"{name} is in several chunks")
    file = path.joinpath(name, "c", *("0" for _ in shape))
    return np.asarray(np.memmap(file, np.dtype(description["data_type"]).newbyteorder("<"), mode="r", shape=shape))
