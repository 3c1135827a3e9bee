"""One shard of a begun store is one task: `write_shard` makes it from nothing but the store's own description.

Called by `convert.py` in local processes and by `cluster.prep_jobs` anywhere else, with the same bytes on processors of one
kind; others may round the last digit of a pixel differently. A shard is written under a temporary name, flushed, renamed,
and only then noted with its size and hash in `.prep/`. Two processes may make the same shard at once, each under its own
temporary name.
"""

import hashlib
import json
import mmap
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits

from data_prep.recipe import Recipe, batches_in_file_order, read_pixels, store_images
from data_prep.stacks import Stack
from spire_dist.data.shards import NOT_THERE
from spire_dist.data.store import map_table
from spire_dist.files import replacing, write_json, write_uncached
from spire_dist.schema import STACKS_NAME

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer

NOTES = ".prep"
"""Folder in the store with one note for each finished shard: its size and sha256, and the scales of compact images."""
BATCHES_AHEAD = 4
"""Read while one is made into what is stored."""


def write_shard(store: Path, shard: int) -> int:
    """Make a shard and its note, unless they are there; returns `shard`. Uses one core and memory for one shard.

    Raises SourceError where a stack cannot be read as it was when the store was begun, OSError where the disk is full.
    """
    if is_noted(store, shard):
        return shard
    attributes = read_attributes(store)
    rows = shard_rows(attributes, shard)
    recipe = read_recipe(store, attributes, rows)
    box, chunk = recipe.box, attributes["images_per_chunk"]
    images = work_space((-(-len(rows) // chunk) * chunk, box, box), recipe.dtype)
    images[len(rows) :] = 0
    scales = np.ones(len(rows), dtype=np.float32)
    with threadpool_limits(1):  # the tasks are what runs side by side
        for batch, pixels in _read_ahead(recipe, batches_in_file_order(recipe, np.arange(len(rows)))):
            found = store_images(recipe, batch, pixels, images, batch)
            if found is not None:
                scales[batch] = found
    try:
        note = write_images(store, attributes, shard, images)
        if attributes["codec"] == "compact":
            note["scales"] = scales.tolist()
        write_json(note_path(store, shard), note, shared=True)
    except FileNotFoundError:  # cleared away by a process that found every shard made, this one too
        if not is_noted(store, shard):
            raise
    return shard


def work_space(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
    """Room for a shard's images, the same memory for every shard that a thread makes; what was in it is still there.

    New pages cost more than what fills them; and these are aligned as `write_uncached` needs it.
    """
    count = int(np.prod(shape))
    size = count * np.dtype(dtype).itemsize
    if len(getattr(_own, "room", b"")) < size:
        _own.room = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # on Linux
            _own.room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(_own.room, dtype=dtype, count=count).reshape(shape)


_own = threading.local()


def _read_ahead(
    recipe: Recipe, batches: list[NDArray[np.int64]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Each batch with its images as they are in the stack: a thread reads the next ones while the caller computes."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[Future[NDArray[np.float32]]] = deque()
        for number, batch in enumerate(batches):
            for ahead in batches[number + len(waiting) : number + BATCHES_AHEAD]:
                waiting.append(reader.submit(read_pixels, recipe, ahead))
            yield batch, waiting.popleft().result()


def write_images(store: Path, attributes: dict[str, Any], shard: int, images: NDArray[np.generic]) -> dict[str, Any]:
    """Put the images [n, D, D] of a shard on the disk, n filled up to whole chunks with zeros; returns size and sha256."""
    path, chunk = store / shard_name(shard), attributes["images_per_chunk"]
    if attributes["codec"] == "none":
        return _write_uncompressed(path, images, chunk, attributes["images_per_shard"] // chunk)
    rows = shard_rows(attributes, shard)
    return _write_compressed(store, path, images[: len(rows)], rows)


def _write_uncompressed(path: Path, images: NDArray[np.generic], chunk: int, chunks: int) -> dict[str, Any]:
    """The bytes that zarr would write: the chunks, then where each begins and its size, then a checksum of that.

    By hand because zarr copies the array several times on its way: here it goes to the file as it is.
    """
    index = np.full((chunks, 2), NOT_THERE, dtype="<u8")
    filled, size = len(images) // chunk, chunk * images[0].nbytes
    index[:filled, 0] = np.arange(filled) * size
    index[:filled, 1] = size
    data = images.data.cast("B")
    tail = index.tobytes()
    tail += crc32c(tail).to_bytes(4, "little")
    with ThreadPoolExecutor(1) as beside:  # the disk needs no core, and the hash no disk
        digest = beside.submit(hashlib.sha256, data)
        with replacing(path, flushed=True, shared=True) as partial:
            whole = write_uncached(partial, data)
            with open(partial, "ab") as file:
                file.write(data[whole:])
                file.write(tail)
    found = digest.result()
    found.update(tail)
    return {"bytes": len(data) + len(tail), "sha256": found.hexdigest()}


def _write_compressed(store: Path, path: Path, images: NDArray[np.generic], rows: range) -> dict[str, Any]:
    """The shard as zarr makes it, in memory: on the disk zarr would read a shard that it is to fill only in part."""
    import zarr  # here, because it is half of what a process takes to start, and uncompressed shards go without it
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {"zarr.json": cpu.Buffer.from_bytes((store / "images" / "zarr.json").read_bytes())}
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(MemoryStore(files), mode="r+")[rows.start : rows.stop] = images
    data = files[str(path.relative_to(store / "images"))].to_bytes()
    with replacing(path, flushed=True, shared=True) as partial:
        partial.write_bytes(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_attributes(store: Path) -> dict[str, Any]:
    """Attributes of a begun or finished store."""
    return json.loads((store / "zarr.json").read_text())["attributes"]


def read_recipe(store: Path, attributes: dict[str, Any], rows: range | NDArray[np.int64]) -> Recipe:
    """How the images of some rows [n] of a store are made; row i of the recipe is row `rows[i]` of the store."""
    wanted = np.asarray(rows)
    used, stack = np.unique(map_table(store, "stack")[wanted], return_inverse=True)
    described = json.loads((store / STACKS_NAME).read_text())
    return Recipe(
        stacks=[Stack(**described[i] | {"path": Path(described[i]["path"])}) for i in used],
        stack=stack.astype(np.int32),
        slice=map_table(store, "slice")[wanted],
        pixel_size_a=map_table(store, "input_pixel_size")[wanted],
        box=attributes["box"],
        extent_a=attributes["extent_a"],
        sign=attributes["sign"]["applied"],
        radius_a=attributes["background_radius_a"] if attributes["normalised"] else None,
        dtype=attributes["dtype"],
    )


def shards_of(attributes: dict[str, Any]) -> range:
    """Numbers of a store's shards."""
    return range(-(-attributes["count"] // attributes["images_per_shard"]))


def shard_rows(attributes: dict[str, Any], shard: int) -> range:
    """Store rows of a shard."""
    size = attributes["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, attributes["count"]))


def shard_name(shard: int) -> str:
    """A shard's file within the store."""
    return f"images/c/{shard}/0/0"


def note_path(store: Path, shard: int) -> Path:
    """The note that says a shard is finished."""
    return store / NOTES / f"shard-{shard:06d}.json"


def is_noted(store: Path, shard: int) -> bool:
    """Whether a shard was finished: noted, and still of the noted size."""
    note, path = note_path(store, shard), store / shard_name(shard)
    try:
        return path.stat().st_size == json.loads(note.read_text())["bytes"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: the shard is made again
        return False


def missing_shards(store: Path) -> list[int]:
    """Shards of a begun store that are still to be made."""
    return [shard for shard in shards_of(read_attributes(store)) if not is_noted(store, shard)]


def size_and_hash(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as the manifest keeps them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
