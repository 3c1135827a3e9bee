"""Particle metadata of any supported program as one table in stated units. Called by `convert.py`; reads no image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.cryosparc import read_cs
from data_prep.relion import read_star
from data_prep.table import ParticleTable, finite
from spire_dist import numpy_pickle
from spire_dist.errors import SourceError
from spire_dist.schema import CTF_COLUMNS

CTF_RANGES = {
    "defocus_u_a": (-2e5, 2e5),
    "defocus_v_a": (-2e5, 2e5),
    "voltage_kv": (20, 2000),
    "cs_mm": (-20, 20),
    "amplitude_contrast": (0, 1),
}
"""What a microscope can have, in the units of `schema.CTF_COLUMNS`."""


def read_particles(source: Path, *, pixel_size: float | None = None, no_ctf: bool = False) -> ParticleTable:
    """Read a RELION .star or cryoSPARC .cs file.

    `pixel_size` (Å/px) overrides what the file says; `no_ctf` gives every particle a CTF of 1. A file without poses
    gives a table whose `rotations` are None. Raises `SourceError` in one line naming file, column or row, and remedy.
    """
    if not source.is_file():
        raise SourceError(f"{source}: no such file; give a RELION .star or cryoSPARC .cs file")
    if source.suffix == ".star":
        return _with_possible_ctf(read_star(source, pixel_size, no_ctf))
    if source.suffix == ".cs":
        return _with_possible_ctf(read_cs(source, pixel_size, no_ctf))
    raise SourceError(
        f"{source}: unknown kind {source.suffix!r}; particles are read from RELION .star or cryoSPARC .cs"
    )


def with_cryodrgn_poses(table: ParticleTable, poses: Path, extent_a: NDArray[np.float64]) -> ParticleTable:
    """The table with the poses of a cryoDRGN pickle: (R [N, 3, 3], t [N, 2]), or R alone.

    cryoDRGN's R is RELION's. Its t is the shift that centres the particle, as a fraction of the image's side
    `extent_a` [N] Å, hence the minus.
    """
    content = numpy_pickle.load(poses)
    rotations, shifts = content if isinstance(content, tuple) and len(content) == 2 else (content, None)
    shifts = np.zeros((len(table), 2)) if shifts is None else shifts
    for name, array, shape in (("rotations", rotations, (len(table), 3, 3)), ("shifts", shifts, (len(table), 2))):
        if np.shape(array) != shape:
            raise SourceError(f"{poses}: {name} have shape {np.shape(array)}; {table.source.name} needs {shape}")
    rotations, shifts = finite(poses, "rotation", rotations), finite(poses, "shift", shifts)
    products = rotations @ np.swapaxes(rotations, 1, 2)
    wrong = np.abs(products - np.eye(3)).max(axis=(1, 2)) + np.abs(np.linalg.det(rotations) - 1)
    if wrong.max() > 1e-3:
        raise SourceError(f"{poses}: row {int(np.argmax(wrong)) + 1} is not a rotation matrix; expected R @ R.T = 1")
    shifts_a = -shifts * extent_a[:, None]
    return replace(table, rotations=rotations.astype(np.float32), shifts_a=shifts_a.astype(np.float32))


def _with_possible_ctf(table: ParticleTable) -> ParticleTable:
    """`table`, refused where a CTF value cannot be in its unit (contrast in percent, voltage in V, defocus in µm)."""
    for name, (low, high) in CTF_RANGES.items():
        values = table.ctf[:, CTF_COLUMNS.index(name)]
        bad = np.flatnonzero(~((values >= low) & (values <= high)))
        if bad.size:
            raise SourceError(
                f"{table.source}: {name} is {values[bad[0]]:g} in row {bad[0] + 1}; expected {low:g} to {high:g}"
            )
    return table
