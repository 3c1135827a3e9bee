"""RELION's STAR files as a particle table. Called by `sources.py`.

Up to 3.0 everything is in one block and origins are in pixels; from 3.1 the microscope is described in an optics table
and origins are in Å. Files in between mix the two, so each value is looked up by name, whichever version wrote it.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from data_prep.table import ParticleTable, finite, sane_pixel_sizes
from spire_dist.errors import SourceError
from spire_dist.physics.poses import matrices_from_relion_angles
from spire_dist.schema import NO_CTF

CTF_DEFAULTS = {
    "rlnDefocusU": None,
    "rlnDefocusV": None,
    "rlnDefocusAngle": None,
    "rlnVoltage": None,
    "rlnSphericalAberration": None,
    "rlnAmplitudeContrast": None,
    "rlnPhaseShift": 0.0,
    "rlnCtfBfactor": 0.0,
    "rlnCtfScalefactor": 1.0,
}
"""RELION's labels in the order of `schema.CTF_COLUMNS`, with the value where the file has no such column."""

IGNORED = {
    "rlnBeamTiltX": ("beam tilt", 0.0),
    "rlnBeamTiltY": ("beam tilt", 0.0),
    "rlnOddZernike": ("odd aberrations", 0.0),
    "rlnEvenZernike": ("even aberrations", 0.0),
    "rlnMagMat00": ("anisotropic magnification", 1.0),
}
"""Columns whose effect the image model leaves out, with the value that means no effect."""


def read_star(source: Path, pixel_size: float | None, no_ctf: bool) -> ParticleTable:
    """The particles of a STAR file; see `sources.read_particles`."""
    particles, optics = _blocks(source)
    groups, names = _optics_groups(source, particles, optics)
    if optics is not None:
        new = [name for name in optics.columns if name not in particles]
        particles = particles.assign(**{name: optics[name].to_numpy()[groups] for name in new})
    _refuse_unsupported(source, particles)

    pixel_sizes = _pixel_sizes(source, particles, pixel_size)
    ctf = np.tile(np.array(NO_CTF), (len(particles), 1)) if no_ctf else _ctf(source, particles)
    rotations = shifts_a = None
    if all(name in particles for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")):
        angles = (_numbers(source, particles, f"rlnAngle{name}") for name in ("Rot", "Tilt", "Psi"))
        rotations = matrices_from_relion_angles(*angles)
        origins = [_origin_a(source, particles, axis, pixel_sizes) for axis in "XY"]
        shifts_a = -np.stack(origins, axis=1).astype(np.float32)
    slices, files, paths = _image_names(source, particles)
    boxes = _numbers(source, particles, "rlnImageSize").astype(np.int64) if "rlnImageSize" in particles else None
    return ParticleTable(
        source=source,
        image_paths=paths,
        image_file=files,
        slice_index=slices,
        rotations=rotations,
        shifts_a=shifts_a,
        ctf=ctf.astype(np.float32),
        optics_group=groups.astype(np.int32),
        optics_names=names,
        pixel_size_a=pixel_sizes,
        stated_box=boxes,
        sign_hint=None,
        ignored=_ignored(particles),
    )


def _blocks(source: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """(particles, optics table or None)."""
    try:
        blocks = starfile.read(source, always_dict=True)
    except Exception as error:  # the parser raises whatever it meets
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{source}: not a readable STAR file ({reason})") from error
    tables = {name: pd.DataFrame([b]) if isinstance(b, dict) else pd.DataFrame(b) for name, b in blocks.items()}
    found = [name for name, table in tables.items() if "rlnImageName" in table]
    if not found:
        held = ", ".join(f"data_{name}" for name in tables) or "no data"
        raise SourceError(f"{source}: no particles: no block has column rlnImageName (the file holds {held})")
    name = "particles" if "particles" in found else found[0]
    if len(tables[name]) == 0:
        raise SourceError(f"{source}: data_{name} has no rows")
    return tables[name], tables.get("optics")


def _optics_groups(
    source: Path, particles: pd.DataFrame, optics: pd.DataFrame | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Row of each particle in the optics table, and the groups' names; joined by number, never by order."""
    if optics is None or len(optics) == 0:
        return np.zeros(len(particles), dtype=np.int64), ["opticsGroup1"]
    numbers = optics["rlnOpticsGroup"].tolist() if "rlnOpticsGroup" in optics else list(range(1, len(optics) + 1))
    if "rlnOpticsGroup" in particles:
        row_of_number = {number: row for row, number in enumerate(numbers)}
        rows = np.array([row_of_number.get(number, -1) for number in particles["rlnOpticsGroup"].tolist()])
    elif len(optics) == 1:
        rows = np.zeros(len(particles), dtype=np.int64)
    else:
        raise SourceError(f"{source}: particles have no column rlnOpticsGroup, but there are {len(optics)} groups")
    if rows.min() < 0:
        row = int(np.argmin(rows))
        number = particles["rlnOpticsGroup"].iloc[row]
        raise SourceError(f"{source}: row {row + 1} is of optics group {number}, but data_optics lists {numbers}")
    names = optics["rlnOpticsGroupName"] if "rlnOpticsGroupName" in optics else [f"opticsGroup{n}" for n in numbers]
    return rows, [str(name) for name in names]


def _refuse_unsupported(source: Path, particles: pd.DataFrame) -> None:
    if "rlnTomoName" in particles:
        raise SourceError(f"{source}: a tilt-series set (column rlnTomoName); plain 2D particles are needed")
    if "rlnImageDimensionality" in particles and 3 in particles["rlnImageDimensionality"].to_list():
        raise SourceError(f"{source}: rlnImageDimensionality is 3 (subtomograms); plain 2D particles are needed")
    if "rlnCtfDataAreCtfPremultiplied" in particles and 1 in particles["rlnCtfDataAreCtfPremultiplied"].to_list():
        raise SourceError(f"{source}: rlnCtfDataAreCtfPremultiplied is 1; extract the particles without it")


def _numbers(source: Path, particles: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return finite(source, name, np.asarray(pd.to_numeric(particles[name], errors="coerce")))


def _pixel_sizes(source: Path, particles: pd.DataFrame, override: float | None) -> NDArray[np.float64]:
    """[N] Å/px: what the user says, else the image's, else the detector's (µm) over the magnification."""
    if override is not None:
        values = np.full(len(particles), float(override))
    elif "rlnImagePixelSize" in particles:
        values = _numbers(source, particles, "rlnImagePixelSize")
    elif "rlnDetectorPixelSize" in particles and "rlnMagnification" in particles:
        detector = _numbers(source, particles, "rlnDetectorPixelSize")
        values = 1e4 * detector / _numbers(source, particles, "rlnMagnification")
    else:
        needed = "rlnImagePixelSize, or rlnMagnification and rlnDetectorPixelSize"
        raise SourceError(f"{source}: no pixel size ({needed}); add the column or give pixel_size in Å")
    return sane_pixel_sizes(source, values)


def _ctf(source: Path, particles: pd.DataFrame) -> NDArray[np.float64]:
    """[N, 9] in RELION's units, which are `schema.CTF_COLUMNS`'s."""
    columns = []
    for name, default in CTF_DEFAULTS.items():
        if name in particles:
            columns.append(_numbers(source, particles, name))
        elif default is not None:
            columns.append(np.full(len(particles), default))
        else:
            raise SourceError(f"{source}: column {name} is missing; add it, or use no_ctf for images without a CTF")
    return np.stack(columns, axis=1)


def _origin_a(
    source: Path, particles: pd.DataFrame, axis: str, pixel_sizes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[N] Å, the shift that centres the particle: stated in Å from RELION 3.1, in pixels before."""
    if f"rlnOrigin{axis}Angst" in particles:
        return _numbers(source, particles, f"rlnOrigin{axis}Angst")
    if f"rlnOrigin{axis}" in particles:
        return _numbers(source, particles, f"rlnOrigin{axis}") * pixel_sizes
    return np.zeros(len(particles))


def _image_names(source: Path, particles: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    """`000012@dir/a.mrcs` is slice 11 of dir/a.mrcs; a name without @ is a file of one image."""
    names = particles["rlnImageName"].astype(str).tolist()
    slices, stacks = np.zeros(len(names), dtype=np.int64), []
    for row, name in enumerate(names):
        number, at, stack = name.rpartition("@")
        if not stack or (at and not (number.isdigit() and int(number) > 0)):
            raise SourceError(f"{source}: row {row + 1} has rlnImageName {name!r}; expected like 000001@stack.mrcs")
        slices[row] = int(number) - 1 if at else 0
        stacks.append(stack)
    files, paths = pd.factorize(np.array(stacks, dtype=object))
    return slices, files.astype(np.int32), [str(path) for path in paths]


def _ignored(particles: pd.DataFrame) -> list[str]:
    """Effects whose columns hold anything but the neutral value (Zernike lists are text in brackets)."""
    effects = set()
    for name, (effect, neutral) in IGNORED.items():
        if name in particles:
            numbers = re.findall(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?", " ".join(map(str, particles[name].unique())))
            if any(float(number) != neutral for number in numbers):
                effects.add(effect)
    return sorted(effects)
