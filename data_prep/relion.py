"""RELION's STAR files as a particle table. Called by `sources.py`; `star.py` parses, `tilt.py` adds tilt series.

Up to 3.0 everything is in one block and origins are in pixels; from 3.1 the microscope is described in an optics table
and origins are in Å. Files in between mix the two, so each value is looked up by name, whichever version wrote it.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.table import ParticleTable, sane_pixel_sizes
from data_prep.tilt import PARTICLE_LABELS, one_image_for_each_tilt
from data_prep.tomograms import SET_LABELS, files_of_set
from spire_dist.errors import ConfigError, SourceError
from spire_dist.physics.poses import matrices_from_relion_angles
from spire_dist.schema import NO_CTF
from spire_dist.star import Columns, numbers, read_blocks

CTF_DEFAULTS = {
    "rlnDefocusU": None,
    "rlnDefocusV": "rlnDefocusU",
    "rlnDefocusAngle": 0.0,
    "rlnVoltage": None,
    "rlnSphericalAberration": None,
    "rlnAmplitudeContrast": None,
    "rlnPhaseShift": 0.0,
    "rlnCtfBfactor": 0.0,
    "rlnCtfScalefactor": 1.0,
}
"""RELION's labels in the order of `schema.CTF_COLUMNS`, with the value or column that stands in where one is missing.

Without rlnDefocusV a defocus has no astigmatism, as in RELION. An astigmatism without its angle is refused.
"""

IGNORED = {
    "rlnBeamTiltX": ("beam tilt", 0.0),
    "rlnBeamTiltY": ("beam tilt", 0.0),
    "rlnOddZernike": ("odd aberrations", 0.0),
    "rlnEvenZernike": ("even aberrations", 0.0),
    "rlnMagMat00": ("anisotropic magnification", 1.0),
    "rlnMagMat01": ("anisotropic magnification", 0.0),
    "rlnMagMat10": ("anisotropic magnification", 0.0),
    "rlnMagMat11": ("anisotropic magnification", 1.0),
}
"""Columns whose effect the image model leaves out, with the value that means no effect."""

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")

LABELS: dict[str, type] = {
    **dict.fromkeys([*ANGLES, "rlnOpticsGroup"], float),
    **dict.fromkeys(["rlnImagePixelSize", "rlnPixelSize", "rlnDetectorPixelSize", "rlnMagnification"], float),
    **dict.fromkeys([f"rlnOrigin{axis}{unit}" for axis in "XYZ" for unit in ("", "Angst")], float),
    **dict.fromkeys(CTF_DEFAULTS, np.float32),
    **dict.fromkeys(["rlnImageSize", "rlnImageDimensionality", "rlnCtfDataAreCtfPremultiplied"], np.float32),
    **dict.fromkeys(["rlnOpticsGroupName", "rlnCtfImage", *IGNORED], str),
    "rlnImageName": tuple,
    **PARTICLE_LABELS,
    **SET_LABELS,
}
"""The columns that are read, and as what (`star.read_blocks`); all others are passed over."""

LARGEST_BOX = 2**15
ROWS_AT_ONCE = 2**16
IMAGE_NUMBER = re.compile("[0-9]{1,9}")


def read_star(source: Path, pixel_size: float | None, no_ctf: bool, tomograms: Path | None = None) -> ParticleTable:
    """The particles of a STAR file, or of the optimisation set of a tilt-series project; see `sources.read_particles`.

    tomograms  the STAR file with the tilt series of 2-D tilt stacks, where it does not lie beside the particles
    """
    blocks = read_blocks(source, LABELS)
    if any("rlnTomoParticlesFile" in columns for columns in blocks.values()):
        particles_star, tomograms_star = files_of_set(source, blocks)
        return read_star(particles_star, pixel_size, no_ctf, tomograms or tomograms_star)
    particles, optics = _particles(source, blocks)
    groups, names = _optics_groups(source, particles, optics)
    ignored = _ignored(optics | particles)
    for label in (*IGNORED, "rlnOpticsGroup", "rlnOpticsGroupName"):
        for columns in (particles, optics):
            columns.pop(label, None)
    for label, cells in optics.items():
        if label not in particles:
            particles[label] = cells[groups]
    in_tilts = _is_tilt_series(source, particles)
    if tomograms is not None and not in_tilts:
        raise ConfigError(
            f"tomograms: {tomograms} is of no use, {source} holds no tilt series (no rlnTomoVisibleFrames)"
        )

    # Columns go as soon as they are used: of ten million particles each takes 80 MB.
    slices, files, paths = _image_names(source, particles.pop("rlnImageName"), in_tilts)
    pixel_sizes = _pixel_sizes(source, particles, len(groups), pixel_size)
    if in_tilts and not no_ctf:  # of the tilts, not of the particle
        particles |= dict.fromkeys(("rlnDefocusU", "rlnDefocusV"), np.zeros(len(groups)))
    ctf = np.tile(np.array(NO_CTF, np.float32), (len(groups), 1)) if no_ctf else _ctf(source, particles, len(groups))
    for label in CTF_DEFAULTS:
        particles.pop(label, None)
    missing_angle = next((angle for angle in ANGLES if angle not in particles), None)
    rotations = None if missing_angle else _rotations([numbers(source, particles, angle) for angle in ANGLES])
    for label in ANGLES:
        particles.pop(label, None)
    axes = "XYZ" if in_tilts else "XY"
    origins_a = np.stack([_origin_a(source, particles, axis, pixel_sizes) for axis in axes], axis=1)
    table = ParticleTable(
        source=source,
        image_paths=paths,
        image_file=files,
        slice_index=slices,
        rotations=rotations,
        shifts_a=None if rotations is None else -origins_a[:, :2].astype(np.float32),
        ctf=ctf,
        optics_group=groups.astype(np.int32),
        optics_names=names,
        pixel_size_a=pixel_sizes,
        stated_box=_boxes(source, particles),
        sign_hint=None,
        ignored=ignored,
        ctf_premultiplied=_any(source, particles, "rlnCtfDataAreCtfPremultiplied", 1),
        missing_poses=f"no column {missing_angle}" if missing_angle else "",
    )
    return one_image_for_each_tilt(table, particles, origins_a, tomograms, no_ctf) if in_tilts else table


def _particles(source: Path, blocks: dict[str, Columns]) -> tuple[Columns, Columns]:
    """(particles, optics table: empty up to RELION 3.0)."""
    found = [name for name, columns in blocks.items() if "rlnImageName" in columns]
    if not found:
        held = ", ".join(f"data_{name}" for name in blocks) or "no data"
        raise SourceError(f"{source}: no particles: no block has column rlnImageName (the file holds {held})")
    name = "particles" if "particles" in found else found[0]
    if len(blocks[name]["rlnImageName"]) == 0:
        raise SourceError(f"{source}: data_{name} has no rows")
    return blocks[name], blocks.get("optics", {})


def _optics_groups(source: Path, particles: Columns, optics: Columns) -> tuple[NDArray[np.int64], list[str]]:
    """Row of each particle in the optics table, and the groups' names; joined by number, never by order."""
    count = len(particles["rlnImageName"])
    listed = len(next(iter(optics.values()), ()))
    if not listed:
        optics.clear()
        return np.zeros(count, dtype=np.int64), ["opticsGroup1"]
    ids = numbers(source, optics, "rlnOpticsGroup") if "rlnOpticsGroup" in optics else np.arange(1.0, listed + 1)
    if len(set(ids)) < listed:
        twice = next(i for i in ids if (ids == i).sum() > 1)
        raise SourceError(f"{source}: data_optics lists optics group {twice:g} twice; expected each number once")
    if "rlnOpticsGroup" in particles:
        order = np.argsort(ids)
        wanted = numbers(source, particles, "rlnOpticsGroup")
        rows = order[np.minimum(np.searchsorted(ids[order], wanted), listed - 1)]
        wrong = np.flatnonzero(ids[rows] != wanted)
        if wrong.size:
            held = ", ".join(f"{i:g}" for i in ids)
            raise SourceError(
                f"{source}: row {wrong[0] + 1} is of optics group {wanted[wrong[0]]:g}, but data_optics lists {held}"
            )
    elif listed == 1:
        rows = np.zeros(count, dtype=np.int64)
    else:
        raise SourceError(f"{source}: particles have no column rlnOpticsGroup, but there are {listed} groups")
    names = optics["rlnOpticsGroupName"] if "rlnOpticsGroupName" in optics else [f"opticsGroup{i:g}" for i in ids]
    return rows, [str(name) for name in names]


def _is_tilt_series(source: Path, particles: Columns) -> bool:
    """Whether an image name stands for a stack of tilts; subtomograms are refused."""
    if _any(source, particles, "rlnImageDimensionality", 3):
        raise SourceError(f"{source}: rlnImageDimensionality is 3 (subtomograms); extract 2-D stacks (RELION 5, Warp)")
    if "rlnCtfImage" in particles:
        raise SourceError(f"{source}: column rlnCtfImage (subtomograms); extract 2-D stacks (RELION 5, Warp)")
    if "rlnTomoVisibleFrames" in particles and "rlnTomoName" in particles:
        return True
    if "rlnTomoName" in particles:
        raise SourceError(
            f"{source}: a tilt-series set (column rlnTomoName) without rlnTomoVisibleFrames; "
            "extract 2-D stacks (RELION 5, Warp)"
        )
    return False


def _any(source: Path, particles: Columns, label: str, value: float) -> bool:
    return label in particles and bool((numbers(source, particles, label) == value).any())


def _pixel_sizes(source: Path, particles: Columns, count: int, override: float | None) -> NDArray[np.float64]:
    """[N] Å/px: what the user says, else the image's, else the detector's (µm) over the magnification."""
    if override is not None:
        values = np.full(count, float(override))
    elif "rlnImagePixelSize" in particles:
        values = numbers(source, particles, "rlnImagePixelSize")
    elif "rlnDetectorPixelSize" in particles and "rlnMagnification" in particles:
        detector, magnification = (
            numbers(source, particles, f"rln{n}") for n in ("DetectorPixelSize", "Magnification")
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            values = 1e4 * detector / magnification
    elif "rlnPixelSize" in particles:
        values = numbers(source, particles, "rlnPixelSize")
    else:
        needed = "rlnImagePixelSize, or rlnMagnification and rlnDetectorPixelSize"
        raise SourceError(f"{source}: no pixel size ({needed}); add the column or give pixel_size in Å")
    return sane_pixel_sizes(source, values)


def _ctf(source: Path, particles: Columns, count: int) -> NDArray[np.float32]:
    """[N, 9] in RELION's units, which are `schema.CTF_COLUMNS`'s."""
    ctf = np.empty((count, len(CTF_DEFAULTS)), dtype=np.float32)
    for column, (label, default) in enumerate(CTF_DEFAULTS.items()):
        if label in particles:
            ctf[:, column] = numbers(source, particles, label)
        elif isinstance(default, str):
            ctf[:, column] = numbers(source, particles, default)
        elif default is not None:
            ctf[:, column] = default
        else:
            raise SourceError(f"{source}: column {label} is missing; add it, or use no_ctf for images without a CTF")
    astigmatic = np.flatnonzero(ctf[:, 0] != ctf[:, 1])
    if "rlnDefocusAngle" not in particles and astigmatic.size:
        row = astigmatic[0]
        raise SourceError(
            f"{source}: column rlnDefocusAngle is missing, but row {row + 1} has rlnDefocusU {ctf[row, 0]:g} and "
            f"rlnDefocusV {ctf[row, 1]:g}; add the column"
        )
    return ctf


def _rotations(angles_deg: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    """[N, 3, 3] of (rot, tilt, psi) [N] each, in blocks: on its way a matrix takes five times its room."""
    rotations = np.empty((len(angles_deg[0]), 3, 3), dtype=np.float32)
    for first in range(0, len(rotations), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        rotations[rows] = matrices_from_relion_angles(*(angles[rows] for angles in angles_deg))
    return rotations


def _origin_a(source: Path, particles: Columns, axis: str, pixel_sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] Å, the shift that centres the particle: stated in Å from RELION 3.1, in pixels before; 0 where missing."""
    if f"rlnOrigin{axis}Angst" in particles:
        return numbers(source, particles, f"rlnOrigin{axis}Angst")
    if f"rlnOrigin{axis}" in particles:
        return numbers(source, particles, f"rlnOrigin{axis}") * pixel_sizes
    return np.zeros(len(pixel_sizes))


def _image_names(
    source: Path, names: NDArray[np.object_], in_tilts: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    """`000012@dir/a.mrcs` is slice 11 of dir/a.mrcs; a name without @ is a file of one image, or a stack of tilts."""
    number_of, before = pd.factorize(names[:, 0])
    file_of, paths = pd.factorize(names[:, 1])
    numbered = [IMAGE_NUMBER.fullmatch(text.removesuffix("@")) for text in before]
    slice_of = np.array([int(n[0]) - 1 if n else -bool(text) for n, text in zip(numbered, before, strict=True)])
    nameless = np.array([not path.strip() for path in paths])
    slices = slice_of[number_of]
    wrong = np.flatnonzero((slices < 0) | nameless[file_of])
    if wrong.size:
        row = wrong[0]
        raise SourceError(
            f"{source}: row {row + 1} has rlnImageName {''.join(names[row])!r}; expected like 000001@stack.mrcs"
        )
    if in_tilts and any(before):
        row = np.flatnonzero(np.array([bool(text) for text in before])[number_of])[0]
        raise SourceError(
            f"{source}: row {row + 1} has rlnImageName {''.join(names[row])!r}; expected the stack of all its tilts"
        )
    return slices, file_of.astype(np.int32), [str(path) for path in paths]


def _boxes(source: Path, particles: Columns) -> NDArray[np.int64] | None:
    if "rlnImageSize" not in particles:
        return None
    boxes = numbers(source, particles, "rlnImageSize")
    wrong = np.flatnonzero(~((boxes >= 1) & (boxes <= LARGEST_BOX) & (boxes == np.floor(boxes))))
    if wrong.size:
        raise SourceError(f"{source}: rlnImageSize is {boxes[wrong[0]]:g} in row {wrong[0] + 1}; expected a box in px")
    return boxes.astype(np.int64)


def _ignored(columns: Columns) -> list[str]:
    """Effects whose columns hold anything but the neutral value (Zernike lists are text in brackets)."""
    effects = set()
    for label, (effect, neutral) in IGNORED.items():
        if label in columns:
            values = re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", " ".join(set(columns[label])))
            if any(float(value) != neutral for value in values):
                effects.add(effect)
    return sorted(effects)
