"""Particle images into a store (`spire_dist.schema`), shard by shard; killed anywhere, the same command goes on.

`prepare` is what `spire-dist prep` calls. It decides everything first (`plan.py`) and then writes (`writing.py`); a
store that was begun goes on only with the options and inputs it was begun with, so that none mixes two sources.
"""

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data_prep.plan import Options, Plan, decide_sign, make_plan
from data_prep.writing import write_manifest, write_missing_shards, write_tables
from spire_dist.errors import ConfigError, StoreError
from spire_dist.schema import CTF_COLUMNS, IMAGES_PER_CHUNK, MANIFEST_NAME, SCHEMA_VERSION

LARGEST_SHARD_BYTES = 2**30


def prepare(
    source: Path,
    store: Path,
    *,
    box: int | None = None,
    datadir: Path | None = None,
    sign: str = "auto",
    radius_a: float | None = None,
    pixel_size: float | None = None,
    labels: Path | None = None,
    no_ctf: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    images_per_shard: int = 4096,
    dtype: str = "float16",
    poses: Path | None = None,
    normalise: bool = True,
    allow_missing_poses: bool = False,
    workers: int | None = None,
) -> Path:
    """Convert the particles of a .star or .cs file into a store, or finish one that was begun by the same call.

    Args:
        source: RELION .star or cryoSPARC .cs.
        store: folder to make.
        box: side of the stored images, px; default: the input's. Smaller means Fourier cropping.
        datadir: folder that the stacks' paths are relative to; default: beside the source and above it.
        sign: "+" where protein is bright in the input, "-" where dark, "auto" to find out from the images.
        radius_a: radius of the particle, Å; outside it is background. Default 0.4 of the image's side.
        pixel_size: Å/px of the input, overriding what the file says.
        labels: .npy or pickle of N true states.
        no_ctf: the images have no CTF (projections).
        seed: of the order in which particles are stored.
        shuffle: store in random order, which lets training read whole chunks.
        images_per_shard: images in one file, a multiple of 64; fewer where a file would exceed 1 GiB.
        dtype: float16 or float32, of the images on disk.
        poses: cryoDRGN pose pickle, instead of the file's poses.
        normalise: bring each image's background to mean 0 and standard deviation 1 (off for noise-free images).
        allow_missing_poses: make a store that can be looked at but not trained on.
        workers: threads; default one per core.

    Returns the store's path. Raises `ConfigError`, `SourceError` or `StoreError`, each in one line.

    """
    source, store = Path(source), Path(store)
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
    begun = _begun_attributes(store)
    plan = make_plan(source, datadir, poses, labels, options)
    if begun is not None:
        _refuse_difference(store, begun, plan)
        if (store / MANIFEST_NAME).exists():
            return store
    try:
        if begun is None:
            _refuse_full_disk(store, plan)
            begun = store_attributes(plan, decide_sign(plan))
            write_tables(store, plan, begun)
        write_missing_shards(store, plan, begun, workers or os.cpu_count() or 1)
        write_manifest(store, begun)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{store}: cannot be written ({reason}); run the same command again when it can") from error
    return store


def store_attributes(plan: Plan, sign: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the store's group: units, what was done to the images, and the inputs."""
    groups = []
    for i, name in enumerate(plan.table.optics_names):
        rows = np.flatnonzero(plan.table.optics_group == i)
        boxes = {plan.stacks[file].box for file in np.unique(plan.table.image_file[rows])}
        sizes = np.unique(plan.table.pixel_size_a[rows])
        groups.append({"name": name, "count": len(rows), "boxes": sorted(boxes), "pixel_sizes_a": sizes.tolist()})
    header_sizes = {round(stack.header_pixel_size, 4) for stack in plan.stacks}
    shard_bytes = IMAGES_PER_CHUNK * plan.box**2 * np.dtype(plan.options.dtype).itemsize
    return {
        "schema_version": SCHEMA_VERSION,
        "count": len(plan.table),
        "box": plan.box,
        "pixel_size_a": plan.pixel_size_a,
        "ctf_columns": list(CTF_COLUMNS),
        "has_poses": plan.table.rotations is not None,
        "has_ctf": not plan.options.no_ctf,
        "optics_groups": groups,
        "ignored_effects": plan.table.ignored,
        "header_pixel_sizes_a": sorted(header_sizes),
        "sign": sign,
        "normalised": plan.options.normalise,
        "background_radius_a": plan.radius_a,
        "codec": "none",
        "images_per_shard": min(
            plan.options.images_per_shard, max(LARGEST_SHARD_BYTES // shard_bytes, 1) * IMAGES_PER_CHUNK
        ),
        "options": asdict(plan.options),
        "inputs": plan.inputs,
    }


def _begun_attributes(store: Path) -> dict[str, Any] | None:
    """Attributes of a store that was begun here before, None where nothing stands."""
    try:
        if (store / "zarr.json").is_file():
            return zarr.open_group(store, mode="r").attrs.asdict()
        if store.exists() and not (store.is_dir() and not any(store.iterdir())):
            raise ConfigError(f"{store}: exists and is not a particle store; give another name")
        existing = _existing_parent(store)
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise ConfigError(f"{store}: cannot be made, {existing} is no folder you may write to; give another name")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise StoreError(f"{store}: cannot be read as a particle store ({error}); give another name") from error
    return None


def _refuse_difference(store: Path, begun: dict[str, Any], plan: Plan) -> None:
    """A store goes on only with the options and inputs it was begun with."""
    if begun.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            f"{store}: store version {begun.get('schema_version')}, not {SCHEMA_VERSION}; give another name"
        )
    for name, now in asdict(plan.options).items():
        if (before := begun["options"].get(name)) != now:
            raise StoreError(f"{store}: begun with {name} = {before}, now {now}; use the same, or another store")
    advice = "use the same files, or another store"
    if len(begun["inputs"]) != len(plan.inputs):
        raise StoreError(f"{store}: begun with {len(begun['inputs'])} input files, now {len(plan.inputs)}; {advice}")
    for before, now in zip(begun["inputs"], plan.inputs, strict=True):
        if (before["role"], before["bytes"], before.get("sha256")) != (now["role"], now["bytes"], now.get("sha256")):
            what = f"{before['bytes']} bytes" + (f", sha256 {before['sha256'][:12]}" if "sha256" in before else "")
            raise StoreError(f"{now['path']}: not the {now['role']} file {store} was begun with ({what}); {advice}")


def _refuse_full_disk(store: Path, plan: Plan) -> None:
    """Say how much will be written, and refuse where it cannot fit."""
    needed = len(plan.table) * plan.box**2 * np.dtype(plan.options.dtype).itemsize
    free = shutil.disk_usage(_existing_parent(store)).free
    line = f"{len(plan.table)} images of {plan.box} px at {plan.pixel_size_a:.4g} Å/px: {_readable(needed)}"
    if needed > free:
        raise ConfigError(f"{store}: {line}, but only {_readable(free)} are free; use a smaller box or another disk")
    print(f"{store}: {line}", file=sys.stderr)


def _existing_parent(store: Path) -> Path:
    """The innermost folder above the store that is there already."""
    return next(parent for parent in store.absolute().parents if parent.exists())


def _readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
