"""All that is decided before the first image is written: which stacks, which grid, which sign, in which order.

Called by `convert.py`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cryodrgn import with_cryodrgn_poses
from data_prep.images import centre_contrast, protein_sign
from data_prep.locate import find_stacks, renamed
from data_prep.recipe import SAME_EXTENT, Recipe, batches_in_file_order, on_common_grid, read_pixels
from data_prep.shards import size_and_hash
from data_prep.sources import read_particles
from data_prep.stacks import STACK_SUFFIXES, Stack, open_stack
from data_prep.table import ParticleTable
from data_prep.tilt import with_slices
from spire_dist.errors import ConfigError, SourceError
from spire_dist.numpy_pickle import load_numbers
from spire_dist.progress import progress
from spire_dist.schema import MOST_IMAGES_PER_CHUNK, images_per_chunk

BACKGROUND_RADIUS = 0.4
"""Default radius of the particle as a fraction of the box side; what lies outside is background."""
IMAGES_FOR_SIGN = 512
DTYPES = {"float16": "float16", "float32": "float32", "compact": "int8"}
"""What the user may ask for, and what the images are on disk."""
LARGEST_SHARD_BYTES = 2**28
"""A shard is made in memory, by each worker."""
PLAN_BYTES_PER_ROW = 320
"""Of memory, for each image, until the store is begun (measured with 300,000 and 900,000 rows of RELION's columns)."""
RUNS_PER_SHARD = 32
"""Places of the input that a shard mixes, at least."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files a store is made from, as the user names them."""

    particles: Path
    """RELION .star, cryoSPARC .cs or .csg, .txt list of stacks, or a stack."""
    datadir: Path | None = None
    """Folder that the stacks' names start from."""
    strip_prefix: str | None = None
    """What to leave out at the beginning of the stacks' names."""
    passthrough: tuple[Path, ...] = ()
    """cryoSPARC .cs files with further columns of the same particles."""
    tomograms: Path | None = None
    """RELION's STAR file of the tilt series, where it does not lie beside the particles."""
    poses: tuple[Path, ...] = ()
    """cryoDRGN pose pickle, or its rotations and shifts in two."""
    ctf: Path | None = None
    """cryoDRGN CTF pickle."""
    labels: Path | None = None
    """.npy or pickle of N true states."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for; a store that was begun with other options is not continued."""

    box: int | None
    sign: str
    radius_a: float | None
    pixel_size: float | None
    no_ctf: bool
    seed: int
    shuffle: bool
    images_per_shard: int
    dtype: str
    normalise: bool
    allow_missing_poses: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A store before its first byte; rows here are the particle file's."""

    table: ParticleTable
    recipe: Recipe
    """Its sign is open (1) until `with_sign`."""
    label: NDArray[np.int32] | None
    order: NDArray[np.int64]
    """[N], the row of each row of the store."""
    images_per_chunk: int
    images_per_shard: int
    options: Options
    inputs: list[dict[str, Any]]
    """The files read, stacks apart: role, path, size, sha256; the particle file first."""

    @property
    def pixel_size_a(self) -> float:
        """Å/px of the stored images."""
        return self.recipe.extent_a / self.recipe.box

    @property
    def image_bytes(self) -> int:
        """Size of a stored image, where nothing is compressed."""
        return self.recipe.box**2 * np.dtype(self.recipe.dtype).itemsize


def make_plan(inputs: Inputs, options: Options) -> Plan:
    """Read all metadata, check it against the stacks' headers and choose the common grid."""
    _check_options(options)
    source = inputs.particles
    table = read_inputs(inputs, options.pixel_size, options.no_ctf)
    paths = find_stacks(table.image_paths, source, inputs.datadir, inputs.strip_prefix)
    if note := renamed(table.image_paths, paths):
        print(f"{source}: {note}", file=sys.stderr)
    stacks = [open_stack(path) for path in progress(paths, "stacks", unit="file")]
    table = with_slices(table, np.array([stack.count for stack in stacks]))
    boxes = _check_slices(table, stacks)
    extents_a = boxes * table.pixel_size_a
    if table.ctf_premultiplied:
        raise SourceError(
            f"{source}: its images were multiplied by their CTF (rlnCtfDataAreCtfPremultiplied is 1), which the image model "
            "does not undo; extract the particles without it"
        )
    if inputs.poses:
        table = with_cryodrgn_poses(table, inputs.poses, extents_a)
    elif table.rotations is None and not options.allow_missing_poses:
        raise SourceError(
            f"{source}: no poses ({table.missing_poses}); refine it first, or give a cryoDRGN pose pickle as poses"
        )
    extent_a = float(extents_a.min())
    if options.radius_a is not None and not 0 < options.radius_a < 0.6 * extent_a:
        raise ConfigError(
            f"radius_a: {options.radius_a:g} Å leaves no background in images of {extent_a:.4g} Å; "
            f"expected the particle's radius, at most {0.6 * extent_a:.4g} Å"
        )
    dtype = DTYPES[options.dtype]
    box = _common_box(source, boxes, table.pixel_size_a, extent_a, options.box)
    chunk = images_per_chunk(box, np.dtype(dtype).itemsize)
    most = LARGEST_SHARD_BYTES // (box**2 * np.dtype(dtype).itemsize) // chunk * chunk
    shard = min(options.images_per_shard, max(most, chunk))
    recipe = Recipe(
        stacks=stacks,
        stack=table.image_file,
        slice=table.slice_index.astype(np.int32),
        pixel_size_a=table.pixel_size_a,
        box=box,
        extent_a=extent_a,
        sign=1,
        radius_a=(options.radius_a or BACKGROUND_RADIUS * extent_a) if options.normalise else None,
        dtype=dtype,
    )
    count = len(table)
    return Plan(
        table=table,
        recipe=recipe,
        label=None if inputs.labels is None else _read_labels(inputs.labels, table),
        order=mixed_order(recipe.stack, recipe.slice, shard, options.seed) if options.shuffle else np.arange(count),
        images_per_chunk=chunk,
        images_per_shard=shard,
        options=options,
        inputs=[_described(role, path) for role, path in _files(inputs, table)],
    )


def read_inputs(inputs: Inputs, pixel_size: float | None, no_ctf: bool) -> ParticleTable:
    """The particle table of the files given; reads no stack but those a .txt list names, and these only for their size."""
    source, datadir, prefix = inputs.particles, inputs.datadir, inputs.strip_prefix
    return read_particles(
        source,
        pixel_size=pixel_size,
        no_ctf=no_ctf,
        passthrough=inputs.passthrough,
        tomograms=inputs.tomograms,
        ctf=inputs.ctf,
        find=lambda names: find_stacks(names, source, datadir, prefix),
    )


def _files(inputs: Inputs, table: ParticleTable) -> list[tuple[str, Path]]:
    """(role, path) of every file that was read, stacks apart; the particle file is the one that rows are counted in."""
    given = [("particles", table.source), *(("poses", path) for path in inputs.poses)]
    given += [(role, path) for role, path in (("ctf", inputs.ctf), ("labels", inputs.labels)) if path]
    return given + [("metadata", path) for path in table.also_read]


def _described(role: str, path: Path) -> dict[str, Any]:
    """Role, path, size and sha256 of a file; a stack given as the particle file is known by its size, as all stacks are."""
    is_stack = path.suffix.lower() in STACK_SUFFIXES
    known = {"bytes": path.stat().st_size, "sha256": ""} if is_stack else size_and_hash(path)
    return {"role": role, "path": str(path.absolute()), **known}


def mixed_order(
    stack: NDArray[np.int32], slices: NDArray[np.int32], images_per_shard: int, seed: int
) -> NDArray[np.int64]:
    """A seeded random order [N] in which every shard is still read from few places, each image once.

    Images are sorted as they lie in their files and cut into runs of neighbours, at most 1/32 of a shard long and never
    across two files; the runs are shuffled and dealt into shards, and the images shuffled within each. So a chunk is a
    random sample of many places, a file of the usual few hundred particles is opened by few tasks, and shards are
    independent tasks, which no full permutation of a large set allows.
    """
    rng = np.random.default_rng(seed)
    by_file = np.lexsort((slices, stack))
    sorted_stack = stack[by_file]
    begins = np.flatnonzero(np.diff(sorted_stack, prepend=-1))
    within = np.arange(len(stack)) - np.repeat(begins, np.diff(begins, append=len(stack)))
    run = np.cumsum(within % max(images_per_shard // RUNS_PER_SHARD, 1) == 0) - 1
    order = by_file[np.argsort(rng.permutation(run[-1] + 1)[run], kind="stable")]
    shards = np.split(order, range(images_per_shard, len(order), images_per_shard))
    return np.concatenate([rng.permutation(shard) for shard in shards])


def with_sign(plan: Plan) -> tuple[Plan, dict[str, Any]]:
    """The plan with the factor that makes protein positive, and how it was found."""
    sign = _decide_sign(plan)
    return replace(plan, recipe=replace(plan.recipe, sign=sign["applied"])), sign


def _decide_sign(plan: Plan) -> dict[str, Any]:
    asked = plan.options.sign
    if asked != "auto":
        return {"applied": -1 if asked == "-" else 1, "found_by": "option"}
    rows = np.unique(np.linspace(0, len(plan.table) - 1, IMAGES_FOR_SIGN).astype(np.int64))
    batches = progress(batches_in_file_order(plan.recipe, rows), "sign")
    found = []
    for batch in batches:
        pixels = read_pixels(plan.recipe, rows[batch])
        found.append(centre_contrast(on_common_grid(plan.recipe, rows[batch], pixels)))
    contrasts = np.concatenate(found)
    measured = protein_sign(contrasts)
    evidence = {"images": len(rows), "contrast": float(contrasts.mean()), "spread": float(contrasts.std())}
    hint = int(np.sign(plan.table.sign_hint or 0.0))
    if measured and hint and measured != hint:
        raise ConfigError(
            f"{plan.table.source}: blob/sign is {hint:+d} ({'dark' if hint < 0 else 'bright'} protein), but images are "
            f"{'dark' if measured < 0 else 'bright'} in the centre; give the sign, - for dark protein or + for bright"
        )
    if not (measured or hint):
        raise ConfigError(
            f"{plan.table.source}: {len(rows)} images cannot tell whether protein is bright or dark (centre contrast "
            f"{contrasts.mean():.2g}, spread {contrasts.std():.2g}); give the sign, - for dark protein or + for bright"
        )
    return {"applied": measured or hint, "found_by": "images" if measured else "blob/sign", **evidence}


def _check_options(options: Options) -> None:
    if options.sign not in ("auto", "+", "-"):
        raise ConfigError(f"sign: {options.sign!r}; expected auto, + (protein is bright) or - (protein is dark)")
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype: {options.dtype!r}; expected {', '.join(DTYPES)}")
    if options.images_per_shard < 1 or options.images_per_shard % MOST_IMAGES_PER_CHUNK:
        raise ConfigError(
            f"images_per_shard: {options.images_per_shard}; expected a multiple of {MOST_IMAGES_PER_CHUNK}"
        )
    if options.box is not None and options.box < 8:
        raise ConfigError(f"box: {options.box} px; expected at least 8")
    if options.seed < 0:
        raise ConfigError(f"seed: {options.seed}; expected 0 or more")


def _check_slices(table: ParticleTable, stacks: list[Stack]) -> NDArray[np.int64]:
    """The box [N] of each particle's image; every slice must exist and every stated box be the stack's."""
    counts = np.array([stack.count for stack in stacks])[table.image_file]
    boxes = np.array([stack.box for stack in stacks])[table.image_file]
    missing = np.flatnonzero(table.slice_index >= counts)
    if missing.size:
        row = missing[0]
        path, asked = stacks[table.image_file[row]].path, table.slice_index[row] + 1
        where = f"{table.source}: row {table.source_index[row] + 1}"
        raise SourceError(f"{where} asks for image {asked} of {path}, which has {counts[row]}")
    if table.stated_box is not None:
        wrong = np.flatnonzero(table.stated_box != boxes)
        if wrong.size:
            row = wrong[0]
            path, stated = stacks[table.image_file[row]].path, table.stated_box[row]
            where = f"{table.source}: row {table.source_index[row] + 1}"
            raise SourceError(f"{where} states a box of {stated} px, {path} has {boxes[row]} px")
    return boxes


def _common_box(
    source: Path, boxes: NDArray[np.int64], pixel_sizes_a: NDArray[np.float64], extent_a: float, asked: int | None
) -> int:
    """Side in px of the grid all images can be brought to without inventing resolution: no pixel may shrink."""
    coarsest_a = float(pixel_sizes_a.max())
    largest = int(extent_a / coarsest_a * (1 + SAME_EXTENT))
    if asked is None:
        alike = (boxes == boxes[0]).all() and np.ptp(boxes * pixel_sizes_a) <= SAME_EXTENT * extent_a
        return int(boxes[0]) if alike else largest // 2 * 2
    if asked > largest:
        raise ConfigError(
            f"box: {asked} px over {extent_a:.4g} Å would be finer than the images of {source} "
            f"({coarsest_a:.4g} Å/px); at most {largest} px"
        )
    return asked


def _read_labels(path: Path, table: ParticleTable) -> NDArray[np.int32]:
    """True states [N] from a .npy, pickle or text file of integers; for tilt series also one for each particle."""
    labels, counts = load_numbers(path, int), f"{len(table)} integers"
    if table.tilt is not None:
        counts += f" (one for each image) or {table.source_rows} (one for each particle)"
        if labels.shape == (table.source_rows,):
            labels = labels[table.source_index]
    if labels.shape != (len(table),) or not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(f"{path}: labels of shape {labels.shape}, type {labels.dtype}; expected {counts}")
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if wrong.size:
        raise SourceError(f"{path}: label {labels[wrong[0]]} in row {wrong[0] + 1}; expected {low} to {high}")
    return labels.astype(np.int32)
