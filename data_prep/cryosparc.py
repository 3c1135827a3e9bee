"""cryoSPARC's particles as a particle table. Called by `sources.py`; `cs_files.py` reads and joins the files.

A job's columns are grouped by prefix: `blob` is the image, `ctf` the microscope, `alignments3D` the pose. Classifications
have a pose for each class, in array columns `alignments3D_multi` or, before cryoSPARC 4.5, `alignments_class_k`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cs_files import Columns, read_columns
from data_prep.table import PIXEL_SIZES_A, ParticleTable, finite, sane_pixel_sizes
from spire_dist.errors import SourceError
from spire_dist.physics.poses import matrices_from_rotation_vectors
from spire_dist.schema import NO_CTF

DEGREES = 180.0 / np.pi
CTF_COLUMNS = {
    "ctf/df1_A": (1.0, None),
    "ctf/df2_A": (1.0, None),
    "ctf/df_angle_rad": (DEGREES, None),
    "ctf/accel_kv": (1.0, None),
    "ctf/cs_mm": (1.0, None),
    "ctf/amp_contrast": (1.0, None),
    "ctf/phase_shift_rad": (DEGREES, 0.0),
    "ctf/bfactor": (1.0, 0.0),
    "ctf/scale": (1.0, 1.0),
}
"""Columns in the order of `schema.CTF_COLUMNS`: factor to its unit, and the value where the column is absent."""

IGNORED = {
    "ctf/tilt_A": "beam tilt",
    "ctf/trefoil_A": "odd aberrations",
    "ctf/tetra_A": "even aberrations",
    "ctf/anisomag": "anisotropic magnification",
}
"""Columns whose effect, unless all zero, the image model leaves out."""

LARGEST_TURN = 100.0
"""rad; rotation vectors a little beyond π occur, these are damage."""
NAMES_AT_ONCE = 65536
ALIGNMENT = ("pose", "shift", "psize_A", "class_posterior")
OLDER_POSE = r"alignments_class_\d+/pose"
"""Until cryoSPARC 4.5 each class had columns of its own; since then `alignments3D_multi` holds arrays."""


def read_cs(source: Path, pixel_size: float | None, no_ctf: bool, passthrough: Sequence[Path] = ()) -> ParticleTable:
    """The particles of a .cs or .csg file and its passthrough files; see `sources.read_particles`."""
    columns, also_read = read_columns(source, passthrough)
    image_file, image_paths, slices = images_of(source, columns)
    count = len(slices)
    pixel_sizes = np.full(count, pixel_size, dtype=np.float64)
    if pixel_size is None:
        _require(source, columns, "blob/psize_A", "give pixel_size in Å")
        pixel_sizes = _numbers(source, columns, "blob/psize_A")
    rotations, shifts_a, missing_poses = _poses(source, columns)
    ids = _integers(source, columns, "ctf/exp_group_id") if "ctf/exp_group_id" in columns else np.zeros(count, np.int64)
    group_ids, groups = np.unique(ids, return_inverse=True)
    signs = np.unique(_numbers(source, columns, "blob/sign")) if "blob/sign" in columns else np.zeros(0)
    return ParticleTable(
        source=source,
        image_paths=image_paths,
        image_file=image_file,
        slice_index=slices,
        rotations=rotations,
        shifts_a=shifts_a,
        ctf=np.tile(np.array(NO_CTF, dtype=np.float32), (count, 1)) if no_ctf else _ctf(source, columns),
        optics_group=groups.astype(np.int32),
        optics_names=[f"exposure group {i}" for i in group_ids],
        pixel_size_a=sane_pixel_sizes(source, pixel_sizes),
        stated_box=_boxes(source, columns) if "blob/shape" in columns else None,
        sign_hint=float(signs[0]) if signs.size == 1 else None,
        ignored=sorted({effect for name, effect in IGNORED.items() if name in columns and np.any(columns[name])}),
        uid=uids_of(source, columns),
        also_read=also_read,
        missing_poses=missing_poses,
    )


def images_of(source: Path, columns: Columns) -> tuple[NDArray[np.int32], list[str], NDArray[np.int64]]:
    """(stack [N] of each particle in the list of names, the names without cryoSPARC's ">", slice [N] from 0)."""
    for name in ("blob/path", "blob/idx"):
        _require(source, columns, name, "give the file of the same job that lists the images as passthrough")
    image_file, names = _stacks(source, columns["blob/path"])
    slices = _integers(source, columns, "blob/idx").astype(np.int64)
    if slices.min() < 0:
        row = int(np.argmin(slices))
        raise SourceError(f"{source}: blob/idx is {slices[row]} in row {row + 1}; expected 0 or more")
    return image_file, names, slices


def uids_of(source: Path, columns: Columns) -> NDArray[np.uint64] | None:
    """[N], cryoSPARC's number of each particle; None where the file has none."""
    return _integers(source, columns, "uid").astype(np.uint64) if "uid" in columns else None


# --- columns, checked ------------------------------------------------------------------------------------------------


def _require(source: Path, columns: Columns, name: str, remedy: str) -> None:
    if name not in columns:
        raise SourceError(f"{source}: column {name} is missing; {remedy}")


def _numbers(source: Path, columns: Columns, name: str, shape: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """Column [N, *shape] of finite numbers."""
    return finite(source, name, _of_shape(source, name, columns[name], "fiu", shape))


def _integers(source: Path, columns: Columns, name: str, shape: tuple[int, ...] = ()) -> NDArray[np.integer]:
    return _of_shape(source, name, columns[name], "iu", shape)


def _of_shape(source: Path, name: str, column: NDArray, kinds: str, shape: tuple[int, ...]) -> NDArray:
    if column.dtype.kind not in kinds or column.shape[1:] != shape:
        what = f"{'integers' if 'f' not in kinds else 'numbers'}{f' of shape {shape}' if shape else ''}"
        raise SourceError(f"{source}: column {name} holds {column.dtype} of shape {column.shape[1:]}; expected {what}")
    return column


def _stacks(source: Path, paths: NDArray) -> tuple[NDArray[np.int32], list[str]]:
    """Index [N] of each particle's stack in the list of distinct stacks, the leading ">" of exported files removed."""
    if paths.dtype.kind not in "SU" or paths.ndim != 1:
        raise SourceError(f"{source}: column blob/path holds {paths.dtype}; expected the names of stacks")
    files = np.empty(len(paths), dtype=np.int32)
    number: dict[str | bytes, int] = {}
    for first in range(0, len(paths), NAMES_AT_ONCE):  # never all names as Python objects
        for row, path in enumerate(paths[first : first + NAMES_AT_ONCE].tolist(), start=first):
            files[row] = number.setdefault(path, len(number))
    names = [path.decode("utf-8", "replace") if isinstance(path, bytes) else path for path in number]
    for place, name in enumerate(names):
        if not (name.isprintable() and name.removeprefix(">")):
            row = int(np.argmax(files == place)) + 1
            raise SourceError(f"{source}: blob/path is {name!r} in row {row}; expected the name of a stack")
    return files, [name.removeprefix(">") for name in names]


def _boxes(source: Path, columns: Columns) -> NDArray[np.int64]:
    """[N] px, the side of each image."""
    sides = _integers(source, columns, "blob/shape", (2,)).astype(np.int64)
    bad = np.flatnonzero(sides[:, 0] != sides[:, 1])
    if bad.size:
        height, width = sides[bad[0]]
        raise SourceError(
            f"{source}: blob/shape is {height} × {width} px in row {bad[0] + 1}; square images are needed"
        )
    return sides[:, 0]


def _ctf(source: Path, columns: Columns) -> NDArray[np.float32]:
    """[N, 9] in the order and units of `schema.CTF_COLUMNS`."""
    ctf = np.empty((len(columns["blob/path"]), len(CTF_COLUMNS)), dtype=np.float32)
    for i, (name, (factor, default)) in enumerate(CTF_COLUMNS.items()):
        if name in columns:
            with np.errstate(over="ignore"):  # to infinity, which no CTF parameter may be
                ctf[:, i] = factor * _numbers(source, columns, name)
        elif default is not None:
            ctf[:, i] = default
        else:
            _require(source, columns, name, "export the particles with their CTF, or use no_ctf for images without one")
    return ctf


# --- poses -----------------------------------------------------------------------------------------------------------


def _poses(source: Path, columns: Columns) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, str]:
    """Rotations [N, 3, 3] and shifts [N, 2] Å in our convention, or None for both and the reason.

    RELION's matrix is the transpose of the rotation vector's (asarnow/pyem and cryoDRGN agree). The shift has the sign
    of RELION's origin, hence the minus, and is in pixels of the alignment, which may be larger than the images'.
    """
    one_class = _with_one_class(source, columns)
    if one_class is None:
        if any(name.startswith("alignments2D/") for name in columns):
            return None, None, "aligned in 2-D only: alignments2D is no 3-D pose"
        return None, None, "no alignments3D/pose, also not in a passthrough file"
    prefix, columns = one_class
    pose, shift, unit = (f"{prefix}/{name}" for name in ("pose", "shift", "psize_A"))
    for name in (shift, unit):
        _require(source, columns, name, f"cryoSPARC writes it beside {pose}; export the particles again")
    vectors, units_a = _numbers(source, columns, pose, (3,)), _numbers(source, columns, unit)
    low, high = PIXEL_SIZES_A
    for name, bad in ((pose, np.abs(vectors).max(axis=1) > LARGEST_TURN), (unit, (units_a < low) | (units_a > high))):
        if bad.any():
            row = int(np.argmax(bad))
            expected = f"expected {low:g} to {high:g} Å" if name == unit else "expected a rotation vector in radians"
            raise SourceError(f"{source}: {name} is {columns[name][row]} in row {row + 1}; {expected}")
    rotations = np.swapaxes(matrices_from_rotation_vectors(vectors), 1, 2)
    with np.errstate(over="ignore"):
        shifts_a = (-_numbers(source, columns, shift, (2,)) * units_a[:, None]).astype(np.float32)
    return np.ascontiguousarray(rotations), shifts_a, ""


def _with_one_class(source: Path, columns: Columns) -> tuple[str, Columns] | None:
    """Prefix and columns of each particle's only alignment, or of that to its most probable class; None without any."""
    if "alignments3D/pose" in columns:
        return "alignments3D", columns
    prefix = "alignments3D_multi"
    if classes := sorted(name.partition("/")[0] for name in columns if re.fullmatch(OLDER_POSE, name)):
        columns = {f"{prefix}/{field}": _stacked(source, columns, classes, field) for field in ALIGNMENT}
    elif f"{prefix}/pose" not in columns:
        return None
    for field in ALIGNMENT:
        _require(source, columns, f"{prefix}/{field}", "cryoSPARC writes it for each class; export the particles again")
    posterior = columns[f"{prefix}/class_posterior"]
    if posterior.ndim != 2 or posterior.shape[1] == 0:
        raise SourceError(f"{source}: {prefix}/class_posterior has shape {posterior.shape[1:]}; expected one per class")
    classes_shape = posterior.shape[1:]
    best = np.argmax(_numbers(source, columns, f"{prefix}/class_posterior", classes_shape), axis=1)
    rows, chosen = np.arange(len(best)), {}
    for name in (f"{prefix}/{field}" for field in ALIGNMENT):
        per_class = columns[name].shape[1:2] == classes_shape  # the pixel size may be one for all
        chosen[name] = columns[name][rows, best] if per_class else columns[name]
    return prefix, chosen


def _stacked(source: Path, columns: Columns, classes: list[str], field: str) -> NDArray:
    """[N, classes, ...]: the same `field` of each of the older prefixes as one array column."""
    for prefix in classes:
        _require(source, columns, f"{prefix}/{field}", "cryoSPARC writes it for each class; export the particles again")
    shape = columns[f"{classes[0]}/{field}"].shape[1:]
    return np.stack([_of_shape(source, f"{c}/{field}", columns[f"{c}/{field}"], "fiu", shape) for c in classes], axis=1)
