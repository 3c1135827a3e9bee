"""A store made of rows of other stores, image bytes as they are. Called by `edit.py`.

A shard that is wanted whole becomes a second name of the same file (a hard link; a copy where the disk does not allow it),
all others are filled with images copied as they are stored. Begun, gone on with and finished like the stores of `prep`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.convert import begun_attributes, cannot_write, complete, existing_parent, readable
from data_prep.shards import note_path, read_attributes, shard_name, shard_rows, work_space, write_images
from data_prep.stacks import Stack
from data_prep.writing import write_tables
from spire_dist.data.store import ParticleStore, map_table, read_manifest
from spire_dist.errors import ConfigError, StoreError
from spire_dist.files import replacing, write_json
from spire_dist.schema import ARRAYS, OPTIONAL_ARRAYS

Pieces = Sequence[tuple[int, NDArray[np.int64]]]
"""(number of a store, rows of it in ascending order), one after the other: what the new store holds."""
RECIPE = ("extent_a", "sign", "background_radius_a")
"""What may have been done differently to the images of each particle file: the attribute `recipes` has it for each."""


def copy_rows(stores: Sequence[ParticleStore], pieces: Pieces, out: Path, did: str) -> None:
    """Make `out` of the pieces of some stores, or finish it where the same call was cut off.

    did  what to write into the new store's history

    Raises `StoreError` where something else is in `out` or the disk is full, `ConfigError` where it cannot be made.
    """
    origin = np.concatenate([np.full(len(rows), number, dtype=np.int32) for number, rows in pieces])
    row = np.concatenate([rows for _, rows in pieces])
    attributes, tables, stacks = _described(stores, origin, row, did)
    begun = begun_attributes(out)
    if begun is None:
        _refuse_full_disk(stores, origin, row, attributes, out)
        try:
            write_tables(out, attributes, tables, stacks)
        except OSError as error:
            raise cannot_write(out, error) from error
    elif begun != attributes or not all(np.array_equal(map_table(out, name), tables[name]) for name in tables):
        raise StoreError(f"{out}: there is another store already; give another name")
    complete(out, partial(_copy_shards, stores, origin, row), "copy")


def _copy_shards(
    stores: Sequence[ParticleStore], origin: NDArray[np.int32], row: NDArray[np.int64], out: Path, shards: list[int]
) -> Iterator[int]:
    """The engine of `complete`: takes the memory of one shard."""
    attributes = read_attributes(out)
    manifests = [read_manifest(store.path)["files"] for store in stores]
    for shard in shards:
        rows = shard_rows(attributes, shard)
        numbers, wanted = origin[rows.start : rows.stop], row[rows.start : rows.stop]
        old = _same_shard(stores, numbers, wanted)
        if old is None:
            note = write_images(out, attributes, shard, _gathered(stores, numbers, wanted))
        else:
            store, name = stores[numbers[0]], shard_name(old)
            note = manifests[numbers[0]][name]
            _link(store.path / name, out / shard_name(shard), note["bytes"])
        write_json(note_path(out, shard), note)
        yield shard


def _same_shard(stores: Sequence[ParticleStore], numbers: NDArray[np.int32], rows: NDArray[np.int64]) -> int | None:
    """The shard of the one store that holds these rows, no others, in this order; None where there is none."""
    store = stores[numbers[0]]
    shard = int(rows[0]) // store.images_per_shard
    held = shard_rows(store.attributes, shard)
    same = len(rows) == len(held) and (numbers == numbers[0]).all() and (rows == np.arange(held.start, held.stop)).all()
    return shard if same else None


def _link(old: Path, new: Path, size: int) -> None:
    """Give the file `old` a second name, or copy it where it lies on another disk. Stores never change their files."""
    if not old.is_file() or old.stat().st_size != size:
        raise StoreError(f"{old}: missing or damaged; `spire-dist verify` checks the whole store")
    with replacing(new, flushed=True) as partial_name:
        try:
            os.link(old.resolve(), partial_name)
        except OSError:
            shutil.copyfile(old, partial_name)


def _gathered(
    stores: Sequence[ParticleStore], numbers: NDArray[np.int32], rows: NDArray[np.int64]
) -> NDArray[np.generic]:
    """The images of a shard as they are stored, filled up to whole chunks with zeros.

    Read by whole chunks, the next one only when the last is copied: each is read, and decompressed, once.
    """
    chunk, box = stores[0].images_per_chunk, stores[0].box
    images = work_space((-(-len(rows) // chunk) * chunk, box, box), stores[0].image_dtype)
    images[len(rows) :] = 0
    where = np.stack([numbers, rows // chunk], axis=1)
    begins = np.flatnonzero(np.concatenate([[True], (where[1:] != where[:-1]).any(axis=1)]))
    for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
        store, first = stores[numbers[begin]], int(rows[begin]) // chunk * chunk
        held = store.stored(np.arange(first, min(first + chunk, store.count)))
        images[begin:end] = held[rows[begin:end] - first]
    return images


# --- what the new store says of itself -------------------------------------------------------------------------------


def _described(
    stores: Sequence[ParticleStore], origin: NDArray[np.int32], row: NDArray[np.int64], did: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], list[Stack]]:
    """(attributes, tables, stacks): those of the stores side by side, without what no particle refers to any more."""
    optional = [name for name in OPTIONAL_ARRAYS if all(getattr(store, name) is not None for store in stores)]
    tables = {
        name: _side_by_side([getattr(store, name) for store in stores], origin, row)
        for name in (*ARRAYS, *optional)
        if name != "images"
    }
    groups = [[{k: v for k, v in g.items() if k != "count"} for g in s.attributes["optics_groups"]] for s in stores]
    tables["optics_group"], optics = _renumbered(tables["optics_group"], origin, groups)
    tables["source"], sources = _renumbered(tables["source"], origin, [_sources(store.attributes) for store in stores])
    described = [store.read_stacks() for store in stores]
    tables["stack"], stacks = _renumbered(tables["stack"], origin, described)
    history: list[Any] = []
    for entry in (entry for store in stores for entry in store.attributes.get("history", [])):
        history += [] if entry in history else [entry]
    counts = np.bincount(tables["optics_group"])
    attributes = {
        **stores[0].attributes,
        **sources[0]["recipe"],
        "count": len(row),
        "optics_groups": [{**group, "count": int(count)} for group, count in zip(optics, counts, strict=True)],
        "ignored_effects": sorted({effect for store in stores for effect in store.attributes["ignored_effects"]}),
        "header_pixel_sizes_a": sorted({round(stack["header_pixel_size"], 4) for stack in stacks}),
        "recipes": [source["recipe"] for source in sources],
        "inputs": [entry for source in sources for entry in source["inputs"]],
        "history": [*history, {"did": did, "fingerprints": [store.fingerprint for store in stores]}],
    }
    return attributes, tables, [Stack(**{**stack, "path": Path(stack["path"])}) for stack in stacks]


def _sources(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """For each particle file: it and the files that belong to it, and what was done to its images."""
    sources: list[dict[str, Any]] = []
    for entry in attributes["inputs"]:
        if entry["role"] == "particles":
            own = attributes["recipes"][len(sources)] if "recipes" in attributes else attributes
            sources.append({"inputs": [], "recipe": {name: own[name] for name in RECIPE}})
        sources[-1]["inputs"].append(entry)
    return sources


def _side_by_side(values: list[NDArray[Any]], origin: NDArray[np.int32], row: NDArray[np.int64]) -> NDArray[Any]:
    result = np.empty((len(row), *values[0].shape[1:]), dtype=values[0].dtype)
    for number, of_store in enumerate(values):
        mine = origin == number
        result[mine] = of_store[row[mine]]
    return result


def _renumbered(
    numbers: NDArray[np.int32], origin: NDArray[np.int32], entries: Sequence[list[dict[str, Any]]]
) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Numbers [N] of entries of each row's store as numbers of one list: equal entries become one, unused ones go."""
    places: dict[str, int] = {}
    common = [[places.setdefault(json.dumps(e, sort_keys=True), len(places)) for e in of_store] for of_store in entries]
    result = np.empty_like(numbers)
    for number, mine in enumerate(common):
        rows = origin == number
        result[rows] = np.array(mine)[numbers[rows]]
    used, result = np.unique(result, return_inverse=True)
    distinct = list(places)
    return result.astype(np.int32), [json.loads(distinct[place]) for place in used]


def _refuse_full_disk(
    stores: Sequence[ParticleStore],
    origin: NDArray[np.int32],
    row: NDArray[np.int64],
    attributes: dict[str, Any],
    out: Path,
) -> None:
    """Refuse what cannot fit; linked shards take no room on the disk of their store."""
    parent, size = existing_parent(out), attributes["images_per_shard"]
    image_bytes = stores[0].box ** 2 * np.dtype(stores[0].image_dtype).itemsize
    needed = 0
    for first in range(0, len(row), size):
        numbers, rows = origin[first : first + size], row[first : first + size]
        linked = _same_shard(stores, numbers, rows) is not None
        if not (linked and stores[numbers[0]].path.stat().st_dev == parent.stat().st_dev):
            needed += len(rows) * image_bytes
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(f"{out}: {readable(needed)} to copy, but only {readable(free)} are free; use another disk")
