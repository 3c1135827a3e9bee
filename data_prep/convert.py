"""Particle images into a store (`spire_dist.schema`), shard by shard; killed anywhere, the same command goes on.

`prepare` is what `spire-dist prep` calls: `begin` decides everything (`plan.py`) and writes all but the images, then
the shards are made, here or by the workers of a cluster, and `complete` closes the store. A store that was begun goes on
only with the options and inputs it was begun with, so that none mixes two sources.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import locate
from data_prep.plan import PLAN_BYTES_PER_ROW, Inputs, Options, Plan, make_plan, read_inputs, with_sign
from data_prep.processes import begin_to_import, in_processes
from data_prep.shards import is_noted, missing_shards, read_attributes, shards_of
from data_prep.writing import finish, planned_tables, write_stacks, write_tables
from spire_dist.data.store import map_table
from spire_dist.errors import ConfigError, SourceError, Stopped, StoreError
from spire_dist.files import remove
from spire_dist.machine import cores
from spire_dist.progress import progress
from spire_dist.schema import CTF_COLUMNS, MANIFEST_NAME, SCHEMA_VERSION, STACKS_NAME

Engine = Callable[[Path, list[int]], Iterable[int]]
"""Makes the given shards of a begun store, in any order, and yields each when it is done."""
WORKER_BYTES = PLAN_BYTES = 200 * 2**20
"""Of a process without its shard, or without its tables: the interpreter and the libraries."""
TABLE_BYTES_PER_ROW = 128
COMPRESSED = 0.8
"""Size of 8-bit noise after compression, 6.05 bits of entropy per pixel."""


def prepare(
    source: Path,
    store: Path,
    *,
    box: int | None = None,
    datadir: Path | None = None,
    strip_prefix: str | None = None,
    passthrough: Sequence[Path] = (),
    tomograms: Path | None = None,
    sign: str = "auto",
    radius_a: float | None = None,
    pixel_size: float | None = None,
    labels: Path | None = None,
    no_ctf: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    images_per_shard: int = 4096,
    dtype: str = "float16",
    poses: Path | Sequence[Path] = (),
    ctf: Path | None = None,
    normalise: bool = True,
    allow_missing_poses: bool = False,
    workers: int | None = None,
    engine: Engine | None = None,
    only_begin: bool = False,
    dry_run: bool = False,
) -> Path:
    """Convert the particles of a .star or .cs file into a store, or finish one that was begun by the same call.

    Args:
        source: RELION .star, cryoSPARC .cs or .csg, a .txt list of stacks or one stack (with `poses` and `ctf`).
        store: folder to make.
        box: side of the stored images, px; default: the input's. Smaller means Fourier cropping.
        datadir: folder that the stacks' paths are relative to; default: beside the source and above it.
        strip_prefix: what to leave out at the beginning of the stacks' names.
        passthrough: cryoSPARC .cs files with further columns of the same particles, joined by uid.
        tomograms: RELION's STAR file of the tilt series, where it does not lie beside the particles.
        sign: "+" where protein is bright in the input, "-" where dark, "auto" to find out from the images.
        radius_a: radius of the particle, Å; outside it is background. Default 0.4 of the image's side.
        pixel_size: Å/px of the input, overriding what the file says.
        labels: .npy or pickle of N true states.
        no_ctf: the images have no CTF (projections).
        seed: of the order in which particles are stored.
        shuffle: store in random order, which lets training read whole chunks.
        images_per_shard: images in one file, a multiple of 64; fewer where a file would exceed 256 MiB.
        dtype: of the images on disk: float16, float32, or compact (8 bits and compressed).
        poses: cryoDRGN pose pickle, or rotations and shifts in two, instead of the file's poses.
        ctf: cryoDRGN CTF pickle, instead of the file's CTFs.
        normalise: bring each image's background to mean 0 and standard deviation 1 (off for noise-free images).
        allow_missing_poses: make a store that can be looked at but not trained on.
        workers: processes; default one per core.
        engine: what makes the shards instead of processes of this machine.
        only_begin: write all but the images; `complete` goes on from there, here or in another place. Several processes
            may do so at once.
        dry_run: check everything, say what it would take, and write nothing.

    Returns the store's path. Raises `ConfigError`, `SourceError` or `StoreError`, each in one line.

    """
    inputs = Inputs(
        particles=Path(source),
        datadir=datadir,
        strip_prefix=strip_prefix,
        passthrough=tuple(passthrough),
        tomograms=tomograms,
        poses=(poses,) if isinstance(poses, Path) else tuple(poses),
        ctf=ctf,
        labels=labels,
    )
    options = Options(
        box=box,
        sign=sign,
        radius_a=radius_a,
        pixel_size=pixel_size,
        no_ctf=no_ctf,
        seed=seed,
        shuffle=shuffle,
        images_per_shard=images_per_shard,
        dtype=dtype,
        normalise=normalise,
        allow_missing_poses=allow_missing_poses,
    )
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: {workers}; expected 1 or more")
    store, workers = Path(store).resolve(), workers or cores()
    if engine is None and workers > 1 and not (only_begin or dry_run):
        begin_to_import()
    try:
        is_new = begin(inputs, options, store, workers, dry_run=dry_run, shared=only_begin)
    except KeyboardInterrupt:
        raise Stopped(f"{store}: stopped before its first image; the same command begins again") from None
    if dry_run or only_begin:
        return store
    try:
        complete(store, engine or partial(in_processes, workers=workers))
    except SourceError:
        if is_new and len(missing_shards(store)) == len(shards_of(read_attributes(store))):  # nothing to go on from
            remove(store)
        raise
    return store


def begin(
    inputs: Inputs, options: Options, store: Path, workers: int = 1, *, dry_run: bool = False, shared: bool = False
) -> bool:
    """Everything but the images, unless it is there; says what the store will take. True where this call made the store.

    With `shared` other processes may be doing the same at this moment. Afterwards the store describes itself: `complete`, or
    `write_shard` anywhere, needs neither inputs nor options.
    """
    begun = begun_attributes(store)
    plan = make_plan(inputs, options)
    if begun is not None:
        _go_on_with(store, begun, plan)
        return False
    needs = _what_it_takes(store, plan, workers)
    signed, sign = with_sign(plan)
    print(needs, file=sys.stderr)
    if dry_run:
        return False
    attributes, tables = store_attributes(signed, sign), planned_tables(signed)
    try:
        write_tables(store, attributes, tables, signed.recipe.stacks, shared=shared)
    except OSError as error:
        if shared and (begun := begun_attributes(store)) is not None:  # another process was first
            _go_on_with(store, begun, plan)
            return False
        raise cannot_write(store, error) from error
    return True


def complete(store: Path, engine: Engine, what: str = "prep") -> None:
    """Make the shards that are not there yet, then the manifest; nothing where the store is finished."""
    if (store / MANIFEST_NAME).exists():
        return
    attributes = read_attributes(store)
    missing, total = missing_shards(store), len(shards_of(attributes))
    try:
        for _ in progress(engine(store, missing), what, total=total, unit="shard", done=total - len(missing)):
            pass
        unmade = [shard for shard in missing if not is_noted(store, shard)]
        if unmade:
            raise StoreError(f"{store}: {len(unmade)} of {total} shards were not made; run the same command again")
        # Of writes that were killed, now or in an earlier call; beside the store those of processes that began it together.
        for leftover in [*store.rglob(".*.partial*"), *store.parent.glob(f".{store.stem}.*-*.partial{store.suffix}")]:
            remove(leftover)
        finish(store, attributes)
    except OSError as error:
        raise cannot_write(store, error) from error
    except KeyboardInterrupt:
        made = total - len(missing_shards(store))
        raise Stopped(f"{store}: stopped with {made} of {total} shards made; the same command goes on") from None


def check_paths(inputs: Inputs) -> list[str]:
    """What is wrong with the paths of the stacks that a particle file names, one line each; none where all are there."""
    names = read_inputs(
        inputs, pixel_size=1.0, no_ctf=True
    ).image_paths  # what has nothing to do with paths may be absent
    return locate.check_paths(names, inputs.particles, inputs.datadir, inputs.strip_prefix)


def cannot_write(store: Path, error: OSError) -> StoreError:
    """What to say where the disk is full or may not be written to."""
    reason = error.strerror or str(error)
    return StoreError(f"{store}: cannot be written ({reason}); run the same command again when it can")


def store_attributes(plan: Plan, sign: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the store's group: units, what was done to the images, and the inputs."""
    groups = []
    for i, name in enumerate(plan.table.optics_names):
        rows = np.flatnonzero(plan.table.optics_group == i)
        boxes = {plan.recipe.stacks[file].box for file in np.unique(plan.table.image_file[rows])}
        sizes = np.unique(plan.table.pixel_size_a[rows])
        groups.append({"name": name, "count": len(rows), "boxes": sorted(boxes), "pixel_sizes_a": sizes.tolist()})
    header_sizes = {round(stack.header_pixel_size, 4) for stack in plan.recipe.stacks}
    return {
        "schema_version": SCHEMA_VERSION,
        "count": len(plan.table),
        "box": plan.recipe.box,
        "pixel_size_a": plan.pixel_size_a,
        "extent_a": plan.recipe.extent_a,
        "ctf_columns": list(CTF_COLUMNS),
        "has_poses": plan.table.rotations is not None,
        "has_ctf": not plan.options.no_ctf,
        "optics_groups": groups,
        "ignored_effects": plan.table.ignored,
        "header_pixel_sizes_a": sorted(header_sizes),
        "sign": sign,
        "normalised": plan.options.normalise,
        "background_radius_a": plan.recipe.radius_a,
        "codec": "compact" if plan.options.dtype == "compact" else "none",
        "dtype": plan.recipe.dtype,
        "images_per_chunk": plan.images_per_chunk,
        "images_per_shard": plan.images_per_shard,
        "options": asdict(plan.options),
        "inputs": plan.inputs,
    }


def begun_attributes(store: Path) -> dict[str, Any] | None:
    """Attributes of a store that was begun here before, None where nothing stands."""
    try:
        if (store / "zarr.json").is_file():
            return read_attributes(store)
        if store.exists() and not (store.is_dir() and not any(store.iterdir())):
            raise ConfigError(f"{store}: exists and is not a particle store; give another name")
        existing = existing_parent(store)
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise ConfigError(f"{store}: cannot be made, {existing} is no folder you may write to; give another name")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise StoreError(f"{store}: cannot be read as a particle store ({error}); give another name") from error
    return None


def _go_on_with(store: Path, begun: dict[str, Any], plan: Plan) -> None:
    """Check that a store was begun with what is asked for now, and is undamaged; its stacks may have moved."""
    try:
        _refuse_difference(store, begun, plan)
        if not (store / MANIFEST_NAME).exists():
            write_stacks(store, plan.recipe.stacks)
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{store}: damaged ({reason}); delete it and run the same command again") from error


def _refuse_difference(store: Path, begun: dict[str, Any], plan: Plan) -> None:
    """A store goes on only with the options and inputs it was begun with."""
    if begun.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            f"{store}: store version {begun.get('schema_version')}, not {SCHEMA_VERSION}; give another name"
        )
    if "history" in begun:
        raise StoreError(f"{store}: was made from other stores (see `spire-dist inspect`); give another name")
    for name, now in asdict(plan.options).items():
        if (before := begun["options"].get(name)) != now:
            raise StoreError(f"{store}: begun with {name} = {before}, now {now}; use the same, or another store")
    advice = "use the same files, or another store"
    if len(begun["inputs"]) != len(plan.inputs):
        raise StoreError(f"{store}: begun with {len(begun['inputs'])} input files, now {len(plan.inputs)}; {advice}")
    for before, now in zip(begun["inputs"], plan.inputs, strict=True):
        if any(before[key] != now[key] for key in ("role", "bytes", "sha256")):
            what = f"{before['bytes']} bytes, sha256 {before['sha256'][:12]}"
            raise StoreError(f"{now['path']}: not the {now['role']} file {store} was begun with ({what}); {advice}")
    stacks = json.loads((store / STACKS_NAME).read_text())
    for before, now in zip(stacks, plan.recipe.stacks, strict=True):
        if before["bytes"] != now.bytes:
            what = f"{before['bytes']} bytes, now {now.bytes}"
            raise StoreError(f"{now.path}: not the stack file {store} was begun with ({what}); {advice}")
    for name, values in planned_tables(plan).items():
        if not np.array_equal(map_table(store, name), values):
            raise StoreError(f"{store / name}: damaged since the store was begun; delete the store and begin again")


def _what_it_takes(store: Path, plan: Plan, workers: int) -> str:
    """How much will be written, read and held, in one line. Raises ConfigError where the disk has no room for it."""
    count = len(plan.table)
    stored_bytes = plan.image_bytes * (COMPRESSED if plan.options.dtype == "compact" else 1) + TABLE_BYTES_PER_ROW
    needed = int(count * stored_bytes)
    free = shutil.disk_usage(existing_parent(store)).free
    shards = -(-count // plan.images_per_shard)
    line = f"{count} images of {plan.recipe.box} px at {plan.pixel_size_a:.4g} Å/px: {readable(needed)}"
    if needed > free:
        raise ConfigError(f"{store}: {line}, but only {readable(free)} are free; use a smaller box or another disk")
    at_once = min(workers, shards)
    copies = 3 if plan.options.dtype == "compact" else 1  # as made, as zarr holds it, and compressed
    memory = at_once * (WORKER_BYTES + copies * min(plan.images_per_shard, count) * plan.image_bytes)
    return (
        f"{store}: {line} in {shards} shard(s), {readable(free)} free; {readable(sum(s.bytes for s in plan.recipe.stacks))} "
        f"in {len(plan.recipe.stacks)} stack(s) to read; about {readable(memory)} of memory for {at_once} process(es), "
        f"{readable(PLAN_BYTES + PLAN_BYTES_PER_ROW * count)} for the plan"
    )


def existing_parent(store: Path) -> Path:
    """The innermost folder above the store that is there already."""
    return next(parent for parent in store.absolute().parents if parent.exists())


def readable(count: int) -> str:
    """A number of bytes, as people read it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
