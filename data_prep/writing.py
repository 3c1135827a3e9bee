"""Writes a planned store. Called by `convert.py`; killed anywhere, the same calls go on and end in the same bytes.

1. everything but the images (attributes, poses, CTF) is written under a temporary name and renamed: the store exists;
2. each shard is one task: written by rename, flushed to disk, and only then noted with its hash in `.prep/`;
3. the manifest, with the hash of every file, comes last: the store is finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from data_prep.plan import Plan, stored_images
from spire_dist.progress import progress
from spire_dist.schema import ARRAYS, IMAGES_PER_CHUNK, MANIFEST_NAME, SCHEMA_VERSION

NOTES = ".prep"
"""Folder in the store with one note per finished shard: its size and sha256."""
ROWS_PER_TABLE_CHUNK = 65536


def write_tables(store: Path, plan: Plan, attributes: dict[str, Any]) -> None:
    """The store without images, complete or absent."""
    store.parent.mkdir(parents=True, exist_ok=True)
    new = store.parent / f".{store.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    group = zarr.create_group(new, attributes=attributes)
    count, box, shard = len(plan.table), plan.box, attributes["images_per_shard"]
    group.create_array(
        "images",
        shape=(count, box, box),
        dtype=plan.options.dtype,
        chunks=(IMAGES_PER_CHUNK, box, box),
        shards=(shard, box, box),
        compressors=None,
        filters=None,
        fill_value=0,
    )
    table, order = plan.table, plan.order
    arrays: dict[str, NDArray[Any]] = {
        "rotations": np.tile(np.eye(3, dtype=np.float32), (count, 1, 1))
        if table.rotations is None
        else table.rotations,
        "shifts": np.zeros((count, 2), dtype=np.float32) if table.shifts_a is None else table.shifts_a,
        "ctf": table.ctf,
        "optics_group": table.optics_group,
        "source_index": np.arange(count, dtype=np.int64),
    }
    if plan.label is not None:
        arrays["label"] = plan.label
    for name, values in arrays.items():
        chunks = (min(count, ROWS_PER_TABLE_CHUNK), *values.shape[1:])
        group.create_array(name, data=values[order], chunks=chunks, compressors=None, filters=None)
    (new / NOTES).mkdir()
    for path in [p for p in new.rglob("*") if p.is_file()]:
        _flush(path)
    new.rename(store)
    _flush(store.parent)


def write_missing_shards(store: Path, plan: Plan, attributes: dict[str, Any], workers: int) -> None:
    """Make the shards that are not noted yet, each from chunks made by `workers` threads."""
    for leftover in (*(store / "images").rglob("*.partial"), *store.rglob(".*.new")):  # of a write that was killed
        leftover.unlink()
    missing = [shard for shard in _shards(attributes) if not _is_noted(store, shard)]
    chunks = -(-attributes["count"] // IMAGES_PER_CHUNK)
    left = sum(-(-len(shard_rows(attributes, shard)) // IMAGES_PER_CHUNK) for shard in missing)
    with ThreadPoolExecutor(workers) as pool:
        work = (step for shard in missing for step in _write_shard(store, plan, attributes, shard, pool))
        for _ in progress(work, "prep", total=chunks, unit="chunk", done=chunks - left):
            pass


def _write_shard(
    store: Path, plan: Plan, attributes: dict[str, Any], shard: int, pool: ThreadPoolExecutor
) -> Iterator[None]:
    """Make, write, flush and note one shard; yields after each chunk. Always in chunks, so that bytes never differ."""
    rows = shard_rows(attributes, shard)
    source_rows = plan.order[rows.start : rows.stop]
    batches = np.split(source_rows, range(IMAGES_PER_CHUNK, len(rows), IMAGES_PER_CHUNK))
    images = np.empty((len(rows), plan.box, plan.box), dtype=plan.options.dtype)
    sign = attributes["sign"]["applied"]
    made = pool.map(lambda batch: stored_images(plan, batch, sign), batches)
    for i, batch in enumerate(made):
        images[i * IMAGES_PER_CHUNK :][: len(batch)] = batch
        yield
    path = store / shard_name(shard)
    path.unlink(missing_ok=True)  # zarr would read a shard that it is to fill only in part
    # An all-zero chunk is written like any other, so that every chunk has a place in its shard.
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(store / "images", mode="r+")
        array[rows.start : rows.stop] = images
    _flush(path)
    _write_json(_note(store, shard), _size_and_hash(path))


def shard_name(shard: int) -> str:
    """A shard's file within the store."""
    return f"images/c/{shard}/0/0"


def _note(store: Path, shard: int) -> Path:
    return store / NOTES / f"shard-{shard:06d}.json"


def _is_noted(store: Path, shard: int) -> bool:
    """Whether a shard was finished: noted, and still of the noted size."""
    note, path = _note(store, shard), store / shard_name(shard)
    return note.exists() and path.exists() and path.stat().st_size == json.loads(note.read_text())["bytes"]


def write_manifest(store: Path, attributes: dict[str, Any]) -> None:
    """Hashes of all files and the fingerprint over them, as the last thing written."""
    tables = [path for name in ARRAYS if name != "images" for path in (store / name).rglob("*") if path.is_file()]
    paths = [store / "zarr.json", store / "images" / "zarr.json", *tables]
    files = {str(path.relative_to(store)): _size_and_hash(path) for path in paths}
    files |= {shard_name(shard): json.loads(_note(store, shard).read_text()) for shard in _shards(attributes)}
    fingerprint = content_fingerprint(files, attributes)
    manifest = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "files": dict(sorted(files.items()))}
    _write_json(store / MANIFEST_NAME, manifest)


def content_fingerprint(files: dict[str, dict[str, Any]], attributes: dict[str, Any]) -> str:
    """One hash of what is stored: images, poses, CTF and pixel size, whatever folder they came from.

    The group's own zarr.json is left out, for it names the inputs' folders.
    """
    hashes = {name: entry["sha256"] for name, entry in files.items() if name != "zarr.json"}
    identity = json.dumps([hashes, attributes["pixel_size_a"], attributes["has_poses"]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def shard_rows(attributes: dict[str, Any], shard: int) -> range:
    """Store rows of a shard."""
    size = attributes["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, attributes["count"]))


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(attributes: dict[str, Any]) -> range:
    return range(-(-attributes["count"] // attributes["images_per_shard"]))


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Complete or absent, also after a power cut."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1))
    _flush(new)
    new.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
