"""Reads a particle store (`spire_dist.schema`): poses, CTF and labels mapped into memory, images read on request.

Called by the loader, evaluation, export and `data_prep.checks`; needs neither torch nor zarr, so that a process that only
reads blocks starts at once and stays small.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spire_dist.data.shards import Shards
from spire_dist.errors import StoreError
from spire_dist.schema import ARRAYS, CTF_COLUMNS, MANIFEST_NAME, OPTIONAL_ARRAYS, SCHEMA_VERSION, STACKS_NAME

SHARDS = "images/c/"
"""What the names of all image files begin with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParticleStore:
    """A finished store of N particles; rows are in store order, `source` and `source_index` lead back to the input's.

    The tables are views of their files: a million particles cost no memory until they are looked at.
    """

    path: Path
    box: int
    """Image side, px."""
    pixel_size: float
    """Å/px."""
    count: int
    """N."""
    images: Shards
    """[N, D, D] as stored: float16, float32, or int8 to be multiplied by `scale`."""
    scale: NDArray[np.float32] | None
    """[N], what the 8-bit images of a compact store are multiplied by."""
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
    """[N], row of the particle in that file, from 0; shared by the tilts of one particle."""
    stack: NDArray[np.int32]
    """[N], entry of `stacks.json`."""
    slice: NDArray[np.int32]
    """[N], image in that stack, from 0."""
    input_pixel_size: NDArray[np.float64]
    """[N], Å/px of the image in that stack."""
    uid: NDArray[np.uint64] | None
    """[N], cryoSPARC's number of each particle."""
    label: NDArray[np.int32] | None
    """[N], the true state where it is known."""
    attributes: dict[str, Any]
    """What prep recorded: options, inputs, sign, normalisation, optics groups."""
    fingerprint: str
    """Changes when an image, pose, CTF or the pixel size does; not when the store or its input is moved."""

    @classmethod
    def open(cls, path: str | Path) -> "ParticleStore":
        """Open a finished store.

        Raises `StoreError` where nothing is there, the store is unfinished or another version of this program wrote it.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():  # a missing piece of a table would be taken for zeros
            if not name.startswith(SHARDS) and not _has_size(path / name, entry["bytes"]):
                raise StoreError(f"{path / name}: missing or damaged; `spire-dist verify` checks the whole store")
        try:
            attributes = json.loads((path / "zarr.json").read_text())["attributes"]
            if tuple(attributes["ctf_columns"]) != CTF_COLUMNS:
                raise ValueError(f"CTF columns {attributes['ctf_columns']}, expected {list(CTF_COLUMNS)}")
            images = Shards.open(path / "images")
            tables: dict[str, Any] = {name: map_table(path, name) for name in ARRAYS if name != "images"}
            for name in OPTIONAL_ARRAYS:
                tables[name] = map_table(path, name) if (path / name).exists() else None
            return cls(
                path=path,
                box=images.box,
                pixel_size=float(attributes["pixel_size_a"]),
                count=images.count,
                images=images,
                attributes=attributes,
                fingerprint=manifest["fingerprint"],
                **tables,
            )
        except (KeyError, TypeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{path}: damaged ({reason}); `spire-dist verify` checks the whole store") from error

    @property
    def image_dtype(self) -> str:
        """float16, float32 or int8, on disk."""
        return str(self.images.dtype)

    @property
    def images_per_chunk(self) -> int:
        """The unit of reading."""
        return self.images.images_per_chunk

    @property
    def images_per_shard(self) -> int:
        """Images in one file."""
        return self.images.images_per_shard

    @property
    def sources(self) -> list[Path]:
        """The particle files, as they were named."""
        return [Path(entry["path"]) for entry in self.attributes["inputs"] if entry["role"] == "particles"]

    def read_stacks(self) -> list[dict[str, Any]]:
        """The stacks that `stack` counts: path, size, number of images, box and type of each."""
        return json.loads((self.path / STACKS_NAME).read_text())

    @property
    def has_poses(self) -> bool:
        """False for a store made with missing poses allowed: good for looking at, not for training."""
        return bool(self.attributes["has_poses"])

    def __len__(self) -> int:
        return self.count

    def stored(self, rows: ArrayLike) -> NDArray[Any]:
        """Images of `rows` (any order, repeats allowed) [len(rows), D, D] as they are on disk.

        Neighbouring rows are read in one piece, so a batch made of whole chunks costs one read per chunk.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        images = np.empty((rows.size, self.box, self.box), self.images.dtype)
        if rows.size == 0:
            return images
        if rows.min() < 0 or rows.max() >= self.count:
            raise IndexError(f"{self.path}: rows {rows.min()}..{rows.max()} asked of {self.count} particles")
        order = np.argsort(rows, kind="stable")
        images[order] = self.images.read(runs_of(rows[order], self.images_per_chunk))
        return images

    def read(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Images of `rows` (any order, repeats allowed) as float32 [len(rows), D, D]."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        images = self.stored(rows).astype(np.float32)
        return images if self.scale is None else images * self.scale[rows, None, None]


def runs_of(rows: NDArray[np.int64], images_per_chunk: int) -> NDArray[np.int64]:
    """Ascending rows as [R, 2] (first row, number of rows): stretches of consecutive rows within one chunk."""
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(rows) != 1) | (rows[1:] % images_per_chunk == 0)]))
    return np.stack([rows[starts], np.diff(starts, append=rows.size)], axis=1)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, whose presence says that the store is finished: schema version, fingerprint, files with hashes."""
    if not (path / "zarr.json").is_file():
        raise StoreError(f"{path}: not a particle store; `spire-dist prep` makes one from a STAR or .cs file")
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text())
    except FileNotFoundError:
        raise StoreError(
            f"{path}: unfinished store; run the same `spire-dist prep` (or filter, merge, add) again to finish it"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: neither text nor JSON
        raise StoreError(f"{path / MANIFEST_NAME}: damaged ({error}); delete it and run prep again") from error
    if not (isinstance(manifest, dict) and {"schema_version", "fingerprint", "files"} <= set(manifest)):
        raise StoreError(f"{path / MANIFEST_NAME}: damaged (no manifest of a store); delete it and run prep again")
    if manifest["schema_version"] != SCHEMA_VERSION:
        found = manifest["schema_version"]
        raise StoreError(f"{path}: store version {found}, this program reads {SCHEMA_VERSION}; make the store again")
    return manifest


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def map_table(path: Path, name: str) -> NDArray[Any]:
    """The array `name` of a store, images apart, as a read-only view of its file: it is one uncompressed chunk.

    Zarr leaves out a chunk that holds nothing but zeros; so it is read.
    """
    about = json.loads((path / name / "zarr.json").read_text())
    shape, dtype = tuple(about["shape"]), np.dtype(about["data_type"]).newbyteorder("<")
    chunk, codecs = about["chunk_grid"]["configuration"]["chunk_shape"], [codec["name"] for codec in about["codecs"]]
    if tuple(chunk) != shape or codecs != ["bytes"]:
        raise ValueError(f"{name} is not one uncompressed chunk")
    file = path.joinpath(name, "c", *("0" for _ in shape))
    return np.asarray(np.memmap(file, dtype, "r", shape=shape)) if file.exists() else np.zeros(shape, dtype)
