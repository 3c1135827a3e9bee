"""The first and the last step of writing a store; what lies between, its shards, is in `shards.py`.

1. `write_tables`: all but the images under a temporary name, then renamed: the store exists, and describes itself so
   completely that its shards need nothing else;
2. each shard is one task, noted in `.prep/` when it is on the disk;
3. `write_manifest`: the hash of every file, as the last thing: the store is finished.

Called by `convert.py` and `edit.py`; killed anywhere, the same calls go on and end in the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from data_prep.plan import Plan
from data_prep.shards import NOTES, note_path, shard_name, shards_of, size_and_hash
from data_prep.stacks import Stack
from spire_dist.files import replacing, write_json
from spire_dist.schema import ARRAYS, MANIFEST_NAME, OPTIONAL_ARRAYS, SCHEMA_VERSION, STACKS_NAME

ATTEMPTS = 5


def planned_tables(plan: Plan) -> dict[str, NDArray[Any]]:
    """All arrays but the images, in the order of the store."""
    table, count = plan.table, len(plan.table)
    no_rotation, no_shift = np.eye(3, dtype=np.float32), np.zeros(2, np.float32)
    tables: dict[str, NDArray[Any]] = {
        "rotations": np.broadcast_to(no_rotation, (count, 3, 3)) if table.rotations is None else table.rotations,
        "shifts": np.broadcast_to(no_shift, (count, 2)) if table.shifts_a is None else table.shifts_a,
        "ctf": table.ctf,
        "optics_group": table.optics_group,
        "source": np.zeros(count, dtype=np.int32),
        "source_index": table.source_index.astype(np.int64),
        "stack": plan.recipe.stack.astype(np.int32),
        "slice": plan.recipe.slice,
        "input_pixel_size": plan.recipe.pixel_size_a,
    }
    if table.uid is not None:
        tables["uid"] = table.uid
    if plan.label is not None:
        tables["label"] = plan.label
    return {name: values[plan.order] for name, values in tables.items()}


def write_tables(
    store: Path,
    attributes: dict[str, Any],
    tables: dict[str, NDArray[Any]],
    stacks: Iterable[Stack],
    *,
    shared: bool = False,
) -> None:
    """The store without images, complete or absent. Raises OSError where something else came to stand there meanwhile.

    `shared` as for `replacing`: of several processes that write the same store at once, the first to end wins.
    """
    count, box = attributes["count"], attributes["box"]
    with replacing(store, flushed=True, shared=shared, over=False) as new:
        group = zarr.create_group(new, attributes=attributes)
        group.create_array(
            "images",
            shape=(count, box, box),
            dtype=attributes["dtype"],
            chunks=(attributes["images_per_chunk"], box, box),
            shards=(attributes["images_per_shard"], box, box),
            compressors=None if attributes["codec"] == "none" else ZstdCodec(level=3),
            filters=None,
            fill_value=0,
        )
        for name, values in tables.items():
            _write_table(group, name, values)
        write_stacks(new, stacks)
        (new / NOTES).mkdir()


def write_stacks(store: Path, stacks: Iterable[Stack]) -> None:
    """Where the images are read from; not written again where it says so already (another process may be reading it)."""
    content = [{**vars(stack), "path": str(stack.path.absolute())} for stack in stacks]
    path = store / STACKS_NAME
    if not path.exists() or json.loads(path.read_text()) != content:
        write_json(path, content, shared=True)


def finish(store: Path, attributes: dict[str, Any]) -> None:
    """What needs every shard: the scales of compact images, then the manifest.

    Where several processes finish a store at once, each makes the same; one may clear away what another is writing under a
    temporary name, which then does it again.
    """
    for attempt in range(ATTEMPTS):
        try:
            if attributes["codec"] == "compact" and not (store / "scale" / "c" / "0").exists():
                _write_scales(store, attributes)
            write_manifest(store, attributes)
            return
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise


def _write_scales(store: Path, attributes: dict[str, Any]) -> None:
    notes = (json.loads(note_path(store, shard).read_text()) for shard in shards_of(attributes))
    scales = np.concatenate([np.array(note["scales"], dtype=np.float32) for note in notes])
    try:
        with replacing(store / "scale", flushed=True, shared=True, over=False) as partial:
            _write_table(zarr.open_group(store), partial.name, scales)
    except OSError:  # another process has put it there
        if not (store / "scale" / "c" / "0").exists():
            raise


def write_manifest(store: Path, attributes: dict[str, Any]) -> None:
    """Hashes of all files and the fingerprint over them, as the last thing written."""
    names = [name for name in (*ARRAYS, *OPTIONAL_ARRAYS) if name != "images"]
    tables = [path for name in names for path in (store / name).rglob("*") if path.is_file()]
    paths = [store / "zarr.json", store / STACKS_NAME, store / "images" / "zarr.json", *tables]
    files = {str(path.relative_to(store)): size_and_hash(path) for path in paths}
    for shard in shards_of(attributes):
        note = json.loads(note_path(store, shard).read_text())
        files[shard_name(shard)] = {"bytes": note["bytes"], "sha256": note["sha256"]}
    fingerprint = content_fingerprint(files, attributes)
    manifest = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "files": dict(sorted(files.items()))}
    write_json(store / MANIFEST_NAME, manifest, shared=True)


def content_fingerprint(files: dict[str, dict[str, Any]], attributes: dict[str, Any]) -> str:
    """One hash of what is stored: images, poses, CTF and pixel size, whatever folder they came from.

    The group's own zarr.json and the list of stacks are left out, for they name the inputs' folders.
    """
    hashes = {name: entry["sha256"] for name, entry in files.items() if name not in ("zarr.json", STACKS_NAME)}
    identity = json.dumps([hashes, attributes["pixel_size_a"], attributes["has_poses"]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _write_table(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """One uncompressed chunk, which readers map into memory: a million poses then cost none of it."""
    with zarr.config.set({"array.write_empty_chunks": True}):  # else a table of zeros is no file
        group.create_array(name, data=values, chunks=values.shape, compressors=None, filters=None)
