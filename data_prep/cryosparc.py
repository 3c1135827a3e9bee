"""cryoSPARC's .cs files (numpy structured arrays) as a particle table. Called by `sources.py`."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.table import ParticleTable, finite, sane_pixel_sizes
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


def read_cs(source: Path, pixel_size: float | None, no_ctf: bool) -> ParticleTable:
    """The particles of a .cs file; see `sources.read_particles`."""
    try:
        rows = np.load(source, allow_pickle=False)
        columns = rows.dtype.names or ()
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{source}: not a cryoSPARC table ({' '.join(str(error).split())})") from error
    for name in ("blob/path", "blob/idx"):
        _require(source, columns, name, "give the .cs file that lists the particle images")
    if len(rows) == 0:
        raise SourceError(f"{source}: the table has no rows")

    pixel_sizes = np.full(len(rows), pixel_size, dtype=np.float64)
    if pixel_size is None:
        _require(source, columns, "blob/psize_A", "give pixel_size in Å")
        pixel_sizes = finite(source, "blob/psize_A", rows["blob/psize_A"])
    ctf = np.tile(np.array(NO_CTF), (len(rows), 1)) if no_ctf else _ctf(source, rows, columns)
    rotations, shifts_a = _poses(source, rows, columns)
    paths = [path.decode() if isinstance(path, bytes) else str(path) for path in rows["blob/path"].tolist()]
    files, distinct = pd.factorize(np.array([path.removeprefix(">") for path in paths], dtype=object))
    ids = rows["ctf/exp_group_id"] if "ctf/exp_group_id" in columns else np.zeros(len(rows), dtype=np.int64)
    group_ids, groups = np.unique(ids, return_inverse=True)
    signs = np.unique(rows["blob/sign"]) if "blob/sign" in columns else np.zeros(0)
    return ParticleTable(
        source=source,
        image_paths=[str(path) for path in distinct],
        image_file=files.astype(np.int32),
        slice_index=rows["blob/idx"].astype(np.int64),
        rotations=rotations,
        shifts_a=shifts_a,
        ctf=ctf.astype(np.float32),
        optics_group=groups.astype(np.int32),
        optics_names=[f"exposure group {i}" for i in group_ids],
        pixel_size_a=sane_pixel_sizes(source, pixel_sizes),
        stated_box=rows["blob/shape"][:, 0].astype(np.int64) if "blob/shape" in columns else None,
        sign_hint=float(signs[0]) if signs.size == 1 else None,
        ignored=sorted({effect for name, effect in IGNORED.items() if name in columns and np.any(rows[name])}),
    )


def _require(source: Path, columns: tuple[str, ...], name: str, remedy: str) -> None:
    if name not in columns:
        raise SourceError(f"{source}: column {name} is missing; {remedy}")


def _ctf(source: Path, rows: NDArray[np.void], columns: tuple[str, ...]) -> NDArray[np.float64]:
    values = []
    for name, (factor, default) in CTF_COLUMNS.items():
        if default is None:
            _require(source, columns, name, "export the particles with their CTF, or use no_ctf for images without one")
        column = rows[name] if name in columns else np.full(len(rows), default)
        values.append(factor * finite(source, name, column))
    return np.stack(values, axis=1)


def _poses(
    source: Path, rows: NDArray[np.void], columns: tuple[str, ...]
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Rotations [N, 3, 3] and shifts [N, 2] Å in our convention; None where the file has no 3D alignment.

    RELION's matrix is the transpose of the rotation vector's (asarnow/pyem and cryoDRGN agree). The shift has the sign
    of RELION's origin, hence the minus, and is in pixels of the alignment, which may be larger than the images'.
    """
    if "alignments3D/pose" not in columns:
        return None, None
    for name in ("alignments3D/shift", "alignments3D/psize_A"):
        _require(source, columns, name, "cryoSPARC writes it beside alignments3D/pose; export the particles again")
    rotations = matrices_from_rotation_vectors(finite(source, "alignments3D/pose", rows["alignments3D/pose"]))
    unit_a = finite(source, "alignments3D/psize_A", rows["alignments3D/psize_A"])
    shifts_a = -finite(source, "alignments3D/shift", rows["alignments3D/shift"]) * unit_a[:, None]
    return np.ascontiguousarray(np.swapaxes(rotations, 1, 2)), shifts_a.astype(np.float32)
