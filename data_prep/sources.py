"""Particle metadata of any supported program as one table in stated units. Called by `plan.py`; reads no image."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.cryodrgn import read_stacks, with_cryodrgn_ctf
from data_prep.cryosparc import read_cs
from data_prep.relion import read_star
from data_prep.table import ParticleTable
from spire_dist.errors import ConfigError, SourceError
from spire_dist.schema import CTF_COLUMNS

CTF_RANGES = {
    "defocus_u_a": (-2e5, 2e5),
    "defocus_v_a": (-2e5, 2e5),
    "defocus_angle_deg": (-1e4, 1e4),
    "voltage_kv": (20, 2000),
    "cs_mm": (-20, 20),
    "amplitude_contrast": (0, 1),
    "phase_shift_deg": (-1e4, 1e4),
    "b_factor_a2": (-1e5, 1e5),
    "scale": (-1e3, 1e3),
}
"""What a microscope can have, in the units of `schema.CTF_COLUMNS`."""
LARGEST_SHIFT_A = 1e4
"""Å; beyond the side of any image."""
KINDS = "RELION .star, cryoSPARC .cs or .csg, a .txt list of stacks, or a .mrcs or .mrc stack"


def read_particles(
    source: Path,
    *,
    pixel_size: float | None = None,
    no_ctf: bool = False,
    passthrough: Sequence[Path] = (),
    ctf: Path | None = None,
    tomograms: Path | None = None,
    find: Callable[[Sequence[str]], list[Path]] | None = None,
) -> ParticleTable:
    """Read a particle file of any kind in `KINDS`.

    Args:
        source: the particle file; its ending, in upper or lower case, tells its kind.
        pixel_size: Å/px, overrides what the file says.
        no_ctf: give every particle a CTF of 1.
        passthrough: further .cs files of the same particles, joined by uid.
        ctf: cryoDRGN's CTF pickle [N, 9], overrides what the file says.
        tomograms: STAR file with the tilt series of 2-D tilt stacks; default: the one beside them.
        find: gives the paths of the stacks that a .txt list names; default: relative to the list.

    A file without poses gives a table whose `rotations` are None. Raises `SourceError` in one line naming file, column
    or row, and remedy.

    """
    kind = source.suffix.lower()
    if not source.is_file():
        raise SourceError(f"{source}: no such file; give {KINDS}")
    if passthrough and kind not in (".cs", ".csg"):
        raise ConfigError(f"passthrough: {passthrough[0]} belongs to a cryoSPARC file, not to {source.name}")
    if tomograms is not None and kind != ".star":
        raise ConfigError(f"tomograms: {tomograms} belongs to RELION's tilt series, not to {source.name}")
    if ctf is not None and no_ctf:
        raise ConfigError(f"ctf: {ctf} and no_ctf exclude each other; give one of them")
    if kind == ".star":
        table = read_star(source, pixel_size, no_ctf or ctf is not None, tomograms)
    elif kind in (".cs", ".csg"):
        table = read_cs(source, pixel_size, no_ctf or ctf is not None, passthrough)
    elif kind in (".txt", ".mrcs", ".mrc"):
        table = read_stacks(source, pixel_size, no_ctf, ctf, find or (lambda names: [source.parent / n for n in names]))
    else:
        raise SourceError(f"{source}: unknown kind {source.suffix!r}; particles are read from {KINDS}")
    return _possible(table if ctf is None else with_cryodrgn_ctf(table, ctf))


def _possible(table: ParticleTable) -> ParticleTable:
    """`table`, refused where a value cannot be in its unit (contrast in percent, voltage in V, defocus in µm)."""
    for name, (low, high) in CTF_RANGES.items():
        values = table.ctf[:, CTF_COLUMNS.index(name)]
        bad = np.flatnonzero(~((values >= low) & (values <= high)))
        if bad.size:
            row = table.source_index[bad[0]] + 1
            raise SourceError(
                f"{table.source}: {name} is {values[bad[0]]:g} in row {row}; expected {low:g} to {high:g}"
            )
    if table.shifts_a is not None:
        bad = np.flatnonzero(~(np.abs(table.shifts_a).max(axis=1) <= LARGEST_SHIFT_A))
        if bad.size:
            row, shift_a = table.source_index[bad[0]] + 1, np.abs(table.shifts_a[bad[0]]).max()
            raise SourceError(
                f"{table.source}: a shift of {shift_a:g} Å in row {row}; expected at most that of an image"
            )
    return table
