"""Stores that show some particles of another one: tables of their own, images by a link. No image is copied.

    training_view   the first particles: what configurations are compared on leaves out the last ones
    half_view       every other chunk: two halves that are trained apart

A view is opened like any store. Zarr opens the first kind; the second has a field in `images/zarr.json` that says where its
chunks lie (`shards.PLACED`), for which Zarr refuses it. Called by sweeps and `training.halves`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spire_dist.data.shards import PLACED
from spire_dist.data.store import SHARDS, ParticleStore, map_table
from spire_dist.errors import StoreError
from spire_dist.files import replacing
from spire_dist.schema import MANIFEST_NAME, SCHEMA_VERSION, STACKS_NAME

Half = Literal[1, 2]
HALVES: tuple[Half, Half] = (1, 2)


def training_view(store: ParticleStore, folder: Path, count: int) -> ParticleStore:
    """A store of the first `count` particles of another. One that is there is used.

    Raises StoreError for a store in the order of its input, whose last particles are no random sample.
    """
    if not store.attributes.get("options", {}).get("shuffle", True):
        raise StoreError(f"{store.path}: its particles are in the order of their file, so that the last ones are no random "
                         "sample; prepare it without --no-shuffle")  # fmt: skip
    return _view(store, folder, np.arange(count), f"first {count}", {})


def half_rows(store: ParticleStore, half: Half) -> NDArray[np.int64]:
    """Rows of a store that are in a half, ascending: those of chunks 0, 2, 4, ... or of 1, 3, 5, ...

    Chunks of a store in random order hold random particles. Taken in turn they also share out the sets that a merged store
    has one after the other, and the states of one in the order of its input.
    """
    rows = np.arange(store.count)
    return rows[rows // store.images_per_chunk % 2 == half - 1]


def half_view(store: ParticleStore, folder: Path, half: Half) -> ParticleStore:
    """A store of one half of another (`half_rows`). One that is there is used, and led to the images again if they moved.

    Raises StoreError where the halves would not be two, or would share an image (particles expanded by symmetry), whose noise
    would make them agree.
    """
    chunk = store.images_per_chunk
    if store.count <= chunk:
        raise StoreError(
            f"{store.path}: {store.count} particles, all in one chunk of {chunk}; too few to be split in two halves"
        )
    images = store.stack.astype(np.int64) << 32 | store.slice
    shared = int(np.isin(images[half_rows(store, 1)], images[half_rows(store, 2)]).sum())
    if shared:
        raise StoreError(f"{store.path}: {shared} images are there more than once and would be in both halves, whose noise "
                         "would then agree; prepare a store in which each image is once")  # fmt: skip
    link = folder / SHARDS.rstrip("/")
    if link.is_symlink() and link.resolve() != (store.path / SHARDS).resolve():
        link.unlink()
        link.symlink_to((store.path / SHARDS).resolve(), target_is_directory=True)
    placed = {PLACED: {"first": half - 1, "every": 2}}
    return _view(store, folder, half_rows(store, half), f"half {half}", placed)


def _view(
    store: ParticleStore, folder: Path, rows: NDArray[np.int64], which: str, placed: dict[str, Any]
) -> ParticleStore:
    fingerprint = hashlib.sha256(f"{store.fingerprint} {which}".encode()).hexdigest()
    if not (folder / MANIFEST_NAME).exists():
        with replacing(folder, flushed=True) as partial:
            _write_view(store, partial, rows, fingerprint, placed)
    view = ParticleStore.open(folder)
    if view.fingerprint != fingerprint:
        raise StoreError(f"{folder}: made of another store than {store.path} as it is now; begin a new folder")
    return view


def _write_view(
    store: ParticleStore, folder: Path, rows: NDArray[np.int64], fingerprint: str, placed: dict[str, Any]
) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / SHARDS).symlink_to((store.path / SHARDS).resolve(), target_is_directory=True)
    group = json.loads((store.path / "zarr.json").read_text())
    group["attributes"]["count"] = len(rows)
    files = {"zarr.json": json.dumps(group).encode(), STACKS_NAME: (store.path / STACKS_NAME).read_bytes()}
    for about_file in sorted(store.path.glob("*/zarr.json")):
        name, about = about_file.parent.name, json.loads(about_file.read_text())
        about["shape"][0] = len(rows)
        if name == "images":
            about |= placed
        else:
            about["chunk_grid"]["configuration"]["chunk_shape"][0] = len(rows)
            place = "/".join([name, "c", *("0" for _ in about["shape"])])
            files[place] = np.ascontiguousarray(map_table(store.path, name)[rows]).tobytes()
        files[f"{name}/zarr.json"] = json.dumps(about).encode()
    entries = {}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "files": entries}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
