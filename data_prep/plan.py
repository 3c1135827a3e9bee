"""All that is decided before the first image is written: which stacks, which grid, which sign, in which order.

Called by `convert.py` to write a store and by `checks.py` to make the images again and compare.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.images import (
    background_mask,
    background_statistics,
    centre_contrast,
    protein_sign,
    resample,
    resampling_matrix,
)
from data_prep.locate import find_stack
from data_prep.sources import read_particles, with_cryodrgn_poses
from data_prep.stacks import Stack, open_stack, read_slices
from data_prep.table import ParticleTable
from spire_dist import numpy_pickle
from spire_dist.errors import ConfigError, SourceError
from spire_dist.progress import progress
from spire_dist.schema import IMAGES_PER_CHUNK

BACKGROUND_RADIUS = 0.4
"""Default radius of the particle as a fraction of the box side; what lies outside is background."""
IMAGES_FOR_SIGN = 512
SAME_EXTENT = 1e-4
"""Fields of view that differ by less than this fraction count as equal (1.31 and 1.3099979 Å/px are)."""


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
    """Everything needed to make any image of the store; rows here are the source's."""

    table: ParticleTable
    stacks: list[Stack]
    """One per `table.image_paths`."""
    box: int
    extent_a: float
    """Side of the stored images, Å."""
    label: NDArray[np.int32] | None
    order: NDArray[np.int64]
    """[N], the source row of each store row."""
    options: Options
    inputs: list[dict[str, Any]]
    """The files read: the particle table first, with hash; then poses and labels; then the stacks, by size only."""

    @property
    def pixel_size_a(self) -> float:
        """Å/px of the stored images."""
        return self.extent_a / self.box

    @property
    def radius_a(self) -> float:
        """Background lies outside this, Å."""
        return self.options.radius_a or BACKGROUND_RADIUS * self.extent_a


def make_plan(
    source: Path,
    datadir: Path | None,
    poses: Path | None,
    labels: Path | None,
    options: Options,
    stack_paths: list[Path] | None = None,
) -> Plan:
    """Read all metadata, check it against the stacks' headers and choose the common grid.

    `stack_paths` are the table's stacks in its order, where they are known already; else they are looked for.
    """
    _check_options(options)
    table = read_particles(source, pixel_size=options.pixel_size, no_ctf=options.no_ctf)
    paths = stack_paths or [find_stack(name, source, datadir) for name in table.image_paths]
    stacks = [open_stack(path) for path in progress(paths, "stacks", unit="file")]
    boxes = _check_slices(table, stacks)
    extents_a = boxes * table.pixel_size_a
    if poses is not None:
        table = with_cryodrgn_poses(table, poses, extents_a)
    elif table.rotations is None and not options.allow_missing_poses:
        raise SourceError(
            f"{source}: no poses (rlnAngleRot, rlnAngleTilt, rlnAnglePsi or alignments3D/pose); refine it first, "
            "or give a cryoDRGN pose pickle as poses"
        )
    count = len(table)
    extent_a = float(extents_a.min())
    if options.radius_a is not None and not 0 < options.radius_a < 0.6 * extent_a:
        raise ConfigError(
            f"radius_a: {options.radius_a:g} Å leaves no background in images of {extent_a:.4g} Å; "
            f"expected the particle's radius, at most {0.6 * extent_a:.4g} Å"
        )
    order = np.random.default_rng(options.seed).permutation(count) if options.shuffle else np.arange(count)
    return Plan(
        table=table,
        stacks=stacks,
        box=_common_box(source, boxes, table.pixel_size_a, extent_a, options.box),
        extent_a=extent_a,
        label=None if labels is None else _read_labels(labels, table),
        order=order,
        options=options,
        inputs=[
            *(_identity(role, p) for role, p in (("particles", source), ("poses", poses), ("labels", labels)) if p),
            *({"role": "stack", "path": str(s.path.absolute()), "bytes": s.bytes} for s in stacks),
        ],
    )


def raw_images(plan: Plan, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images of source rows [n] on the common grid, float32 [n, D, D], before sign and normalisation."""
    images = np.empty((len(rows), plan.box, plan.box), dtype=np.float32)
    files = plan.table.image_file[rows]
    for file in np.unique(files):
        stack, mine = plan.stacks[file], np.flatnonzero(files == file)
        pixels = read_slices(stack, plan.table.slice_index[rows[mine]])
        spans = np.array([_span(stack.box, plan.extent_a, size) for size in plan.table.pixel_size_a[rows[mine]]])
        for span in np.unique(spans):  # one, unless optics groups share a stack
            same = spans == span
            images[mine[same]] = resample(pixels[same], resampling_matrix(stack.box, plan.box, float(span)))
    return images


def stored_images(plan: Plan, rows: NDArray[np.int64], sign: int) -> NDArray[np.floating]:
    """Images of source rows [n] as the store holds them: protein positive, background normalised, in its type."""
    images = raw_images(plan, rows)
    scale = np.full(len(rows), sign, dtype=np.float32)
    mean = np.zeros(len(rows), dtype=np.float32)
    if plan.options.normalise:
        mask = background_mask(plan.box, plan.radius_a / plan.pixel_size_a)
        mean, deviation = background_statistics(images, mask)
        flat = deviation <= 1e-6 * np.abs(images).max(axis=(1, 2))
        if flat.any():
            raise SourceError(
                f"{_name(plan, rows[np.argmax(flat)])}: flat background outside {plan.radius_a:.0f} Å (standard "
                "deviation 0) cannot be normalised; noise-free images need normalise off"
            )
        scale = scale / deviation
    with np.errstate(over="ignore"):
        stored = ((images - mean[:, None, None]) * scale[:, None, None]).astype(plan.options.dtype)
    bad = ~np.isfinite(stored).all(axis=(1, 2))
    if bad.any():
        raise SourceError(
            f"{_name(plan, rows[np.argmax(bad)])}: values too large for {stored.dtype}; use dtype float32"
        )
    return stored


def decide_sign(plan: Plan) -> dict[str, Any]:
    """The factor that makes protein positive, with how it was found."""
    asked = plan.options.sign
    if asked != "auto":
        return {"applied": -1 if asked == "-" else 1, "found_by": "option"}
    rows = np.unique(np.linspace(0, len(plan.table) - 1, IMAGES_FOR_SIGN).astype(np.int64))
    batches = np.split(rows, range(IMAGES_PER_CHUNK, len(rows), IMAGES_PER_CHUNK))
    contrasts = np.concatenate([centre_contrast(raw_images(plan, batch)) for batch in progress(batches, "sign")])
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
    if options.dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype: {options.dtype!r}; expected float16 or float32")
    if options.images_per_shard < 1 or options.images_per_shard % IMAGES_PER_CHUNK:
        raise ConfigError(f"images_per_shard: {options.images_per_shard}; expected a multiple of {IMAGES_PER_CHUNK}")
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
        raise SourceError(f"{table.source}: row {row + 1} asks for image {asked} of {path}, which has {counts[row]}")
    if table.stated_box is not None:
        wrong = np.flatnonzero(table.stated_box != boxes)
        if wrong.size:
            row = wrong[0]
            path, stated = stacks[table.image_file[row]].path, table.stated_box[row]
            raise SourceError(f"{table.source}: row {row + 1} states a box of {stated} px, {path} has {boxes[row]} px")
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


def _span(box: int, extent_a: float, pixel_size_a: float) -> float:
    """Side of the common field of view in an image's own pixels; rounded so that equal cases are exactly equal."""
    span = extent_a / pixel_size_a
    return float(box) if abs(span / box - 1) < SAME_EXTENT else round(span, 6)


def _read_labels(path: Path, table: ParticleTable) -> NDArray[np.int32]:
    """True states [N] from a .npy or pickle of integers."""
    try:
        labels = np.asarray(np.load(path, allow_pickle=False) if path.suffix == ".npy" else numpy_pickle.load(path))
    except (OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: cannot be read as labels ({' '.join(str(error).split())})") from error
    if labels.shape != (len(table),) or not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(
            f"{path}: labels of shape {labels.shape}, type {labels.dtype}; expected {len(table)} integers"
        )
    return labels.astype(np.int32)


def _identity(role: str, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"role": role, "path": str(path.absolute()), "bytes": len(content), "sha256": digest}


def _name(plan: Plan, row: np.int64) -> str:
    return f"{plan.stacks[plan.table.image_file[row]].path}: image {plan.table.slice_index[row] + 1}"
