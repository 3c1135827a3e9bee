"""One shuffled epoch of a large set through the loader, beside reading its bytes in order and beside what lazy loaders do.

    python -m benchmarks.loading OUT [--particles 1000000]

Makes a store of white noise at 64 px in OUT, one of a tenth of the particles, and an .mrcs (mode 2, float32, as most programs
write it) of as many particles: 24 GB for a million, kept for the next call. Each round then times, in turn, all of them to
float32 of 64 images: reading the store's bytes in order through numpy's memory map and converting them (warm); a shuffled
epoch through the loader with 0, 1 and 2 reading processes (warm, `benchmarks.epoch`, in a process of its own); the same
with the store dropped from the page cache; single images of the .mrcs at random through mrcfile's memory map, dropped from
the cache before, a sample of them, scaled to all. Memory is that of all the epoch's processes without pages of files (Pss_Anon
+ Pss_Shmem), looked at 20 times a second, at its highest. OUT gets loading.json and loading.md.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mrcfile
import numpy as np
import psutil
import typer
import zarr

from benchmarks.epoch import BATCH
from benchmarks.machine import describe_machine, machine_line
from benchmarks.step import take_turns
from benchmarks.tables import table, write
from data_prep.shards import note_path, shard_name, shard_rows, shards_of, size_and_hash
from data_prep.writing import finish, write_tables
from spire_dist.files import write_json
from spire_dist.physics.poses import random_rotations
from spire_dist.progress import progress
from spire_dist.schema import CTF_COLUMNS, MANIFEST_NAME, NO_CTF, SCHEMA_VERSION, images_per_chunk

BOX, IMAGES_PER_SHARD = 64, 4096
WORKERS = (0, 1, 2)
IN_ORDER, LAZY = "in order, numpy memory map", "single images at random, mrcfile memory map, cold"
TARGETS = {"warm": 0.9, "cold": 10, "bytes": 1.5e9}


def main(
    out: Annotated[Path, typer.Argument(help="Folder for stores, stack and results.")],
    particles: Annotated[int, typer.Option(help="Of the larger store.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Of which medians are taken.")] = 3,
    sample: Annotated[int, typer.Option(help="Images read one by one.")] = 20_000,
) -> None:
    """Make the data, time everything in turns, print one table."""
    counts = (particles // 10, particles)
    stores = [make_store(out / f"store-{count}", count) for count in counts]
    stack = make_stack(out / f"stack-{particles}.mrcs", particles)
    peaks: dict[str, list[dict[str, float]]] = {}
    for store, count in zip(stores, counts, strict=True):  # also warms up
        peaks[str(count)] = [epoch(store, workers) for workers in WORKERS]
    ways = {IN_ORDER: partial(read_in_order, stores[1])}
    for workers in WORKERS:
        ways[epoch_name(workers, "warm")] = partial(timed_epoch, stores[1], workers, cold=False)
    for workers in WORKERS:
        ways[epoch_name(workers, "cold")] = partial(timed_epoch, stores[1], workers, cold=True)
    ways[LAZY] = partial(read_at_random, stack, min(sample, particles))
    result = {
        "machine": describe_machine(1),
        "particles": particles,
        "box": BOX,
        "sample": min(sample, particles),
        "images_per_s": take_turns(ways, rounds),
        "epochs": peaks,
    }
    text = list(lines(result))
    print("\n".join(("", *text)))
    write(out, "loading", result, text)


def epoch_name(workers: int, cache: str) -> str:
    """Of an epoch in the tables."""
    readers = "a thread" if workers == 0 else f"{workers} process{'es' if workers > 1 else ''}"
    return f"shuffled epoch, {readers}, {cache}"


# ---- data


def make_store(path: Path, count: int) -> Path:
    """A finished store of noise; its shards hold the same images, each in a sequence of its own."""
    if (path / MANIFEST_NAME).exists():
        return path
    attributes = {
        "schema_version": SCHEMA_VERSION,
        "count": count,
        "box": BOX,
        "pixel_size_a": 3.0,
        "ctf_columns": list(CTF_COLUMNS),
        "has_poses": True,
        "codec": "none",
        "dtype": "float16",
        "images_per_chunk": images_per_chunk(BOX, 2),
        "images_per_shard": IMAGES_PER_SHARD,
        "inputs": [],
    }
    rows = np.arange(count)
    tables: dict[str, Any] = {
        "rotations": random_rotations(count, seed=0).astype(np.float32),
        "shifts": np.zeros((count, 2), dtype=np.float32),
        "ctf": np.tile(np.array(NO_CTF, dtype=np.float32), (count, 1)),
        "input_pixel_size": np.full(count, 3.0),
        "source_index": rows,
        "slice": rows.astype(np.int32),
    } | dict.fromkeys(("optics_group", "source", "stack"), np.zeros(count, dtype=np.int32))
    write_tables(path, attributes, tables, [])
    images, noise = zarr.open_array(path / "images"), noise_images().astype(np.float16)
    for shard in progress(shards_of(attributes), path.name, unit="shard"):
        here = shard_rows(attributes, shard)
        images[here.start : here.stop] = np.roll(noise, shard, axis=0)[: len(here)]
        write_json(note_path(path, shard), size_and_hash(path / shard_name(shard)))
    finish(path, attributes)
    return path


def make_stack(path: Path, count: int) -> Path:
    """An .mrcs with images like those of the store, in float32."""
    if not path.exists():
        partial_path, noise = path.with_suffix(".partial.mrcs"), noise_images()
        with mrcfile.new_mmap(partial_path, (count, BOX, BOX), mrc_mode=2, overwrite=True) as mrc:
            data = mrc.data
            assert data is not None
            for start in progress(range(0, count, len(noise)), path.name, unit="piece"):
                data[start : start + len(noise)] = noise[: count - start]
        os.replace(partial_path, path)
    return path


def noise_images() -> np.ndarray:
    """As many as a shard holds, [n, D, D]."""
    return np.random.default_rng(0).standard_normal((IMAGES_PER_SHARD, BOX, BOX), dtype=np.float32)


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def shards(store: Path) -> list[Path]:
    """Files of a store's images, in order."""
    return sorted((store / "images" / "c").glob("*/0/0"), key=lambda path: int(path.parts[-3]))


# ---- measurements, each in images/s


def read_in_order(store: Path) -> float:
    """The bytes of all images, through the memory map of every shard, as float32."""
    start, done = time.perf_counter(), 0
    for path in shards(store):
        values = np.memmap(path, dtype=np.float16, mode="r")
        images = values[: len(values) // BOX**2 * BOX**2].reshape(-1, BOX, BOX)  # without the index at the end
        for first in range(0, len(images), BATCH):
            images[first : first + BATCH].astype(np.float32)
        done += len(images)
    return done / (time.perf_counter() - start)


def read_at_random(stack: Path, sample: int) -> float:
    """Single images to float32, batch by batch, as a loader does that keeps no images."""
    forget([stack])
    with mrcfile.mmap(stack, mode="r", permissive=True) as mrc:
        data = mrc.data
        assert data is not None
        rows = np.random.default_rng(time.time_ns()).permutation(len(data))[:sample]
        start = time.perf_counter()
        for first in range(0, sample, BATCH):
            np.stack([np.array(data[row], dtype=np.float32) for row in rows[first : first + BATCH]])
        return sample / (time.perf_counter() - start)


def timed_epoch(store: Path, workers: int, cold: bool) -> float:
    """A whole shuffled epoch; until the first batch is there processes start, which is not counted."""
    if cold:
        forget(shards(store))
    result = epoch(store, workers)
    return result["particles"] / result["s"]


def epoch(store: Path, workers: int) -> dict[str, float]:
    """What `benchmarks.epoch` says, and the memory of all its processes together at its highest."""
    command = [sys.executable, "-m", "benchmarks.epoch", str(store), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    assert process.stdout is not None
    return json.loads(process.stdout.read()) | {"peak_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    """Memory of a process and its descendants that is no page of a file; shared pages are counted once."""
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        total += sum(1024 * int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    return total


# ---- text


def lines(result: dict) -> Iterator[str]:
    """The result as Markdown that also reads well in a terminal, ratios first."""
    rates, particles = result["images_per_s"], result["particles"]
    yield "## Loading"
    yield ""
    yield machine_line(result["machine"])
    yield ""
    yield (
        f"{particles:,} particles of {BOX} px, {particles * BOX**2 * 2e-9:.1f} GB as float16, to float32 batches of {BATCH}; "
        f"medians of {len(rates[IN_ORDER])} rounds. Targets: {TARGETS['warm']} of reading in order; {TARGETS['cold']} × "
        f"single images (float32 .mrcs, {result['sample']:,} of them)."
    )
    yield ""
    yield from table(
        ("to float32", "of in order", "× single images", "images/s", "all of them"),
        (
            (
                name,
                times(values, rates[IN_ORDER]),
                times(values, rates[LAZY]),
                f"{median(values):,.0f}",
                f"{particles / median(values):.1f} s",
            )
            for name, values in rates.items()
        ),
    )
    yield ""
    small, large = result["epochs"].values()
    yield from table(
        (
            "all processes, pages of files apart",
            *(f"{int(count):,} particles" for count in result["epochs"]),
            "difference",
            "first batch",
        ),
        (
            (
                epoch_name(workers, "memory"),
                megabytes(few["peak_bytes"]),
                megabytes(many["peak_bytes"]),
                megabytes(many["peak_bytes"] - few["peak_bytes"]),
                f"{many['start_s']:.1f} s",
            )
            for workers, few, many in zip(WORKERS, small, large, strict=True)
        ),
    )
    yield ""
    yield f"Target: {TARGETS['bytes'] / 1e9} GB, the same for both."


def times(values: list[float], others: list[float]) -> str:
    """The median of the rounds' ratios."""
    return f"{median(a / b for a, b in zip(values, others, strict=True)):.2f}"


def megabytes(size: float) -> str:
    """As it stands in a table."""
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    typer.run(main)
