"""Tilt series: the rotation and CTF of every tilt, from RELION 5, RELION 4 or Warp. Called by `relion.py` and `tilt.py`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from data_prep.locate import find_beside
from spire_dist.errors import SourceError
from spire_dist.star import Columns, numbers, read_blocks, vectors

SET_LABELS: dict[str, type] = {"rlnTomoParticlesFile": str, "rlnTomoTomogramsFile": str}
"""Labels of an optimisation set, which names the two files."""

TOMOGRAM_LABELS: dict[str, type] = {
    **dict.fromkeys(["rlnTomoName", "rlnTomoTiltSeriesStarFile"], str),
    **dict.fromkeys(["rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ", "rlnTomoTiltSeriesPixelSize"], float),
    **dict.fromkeys(["rlnTomoHand", "rlnTomoDefocusSlope", "rlnCtfBfactorPerElectronDose"], float),
}
TILT_LABELS: dict[str, type] = {
    **dict.fromkeys(["rlnTomoProjX", "rlnTomoProjY", "rlnTomoProjZ"], str),
    **dict.fromkeys(["rlnTomoXTilt", "rlnTomoYTilt", "rlnTomoZRot", "rlnMicrographPreExposure"], float),
    **dict.fromkeys(["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfScalefactor"], float),
}
TILT_CTF = {
    "defocus_u_a": ("rlnDefocusU", None),
    "defocus_v_a": ("rlnDefocusV", None),
    "defocus_angle_deg": ("rlnDefocusAngle", None),
    "phase_shift_deg": ("rlnPhaseShift", 0.0),
    "scale": ("rlnCtfScalefactor", 1.0),
}
"""CTF columns that belong to the tilt: RELION's label, and the value where the series has no such column."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """The T tilts of one tomogram."""

    rotations: NDArray[np.float64]
    """[T, 3, 3], tomogram to image."""
    ctf: NDArray[np.float64]
    """[T, 6]: the columns of `TILT_CTF` at the centre of the tomogram, and the B-factor, Å²."""
    centre_a: NDArray[np.float64] | None
    """[3], Å, middle of the tomogram; None where its size is not given."""
    pixel_size_a: float
    """Å/px of the tilt series."""
    hand: float
    """Change of defocus for each Å of depth: rlnTomoHand · rlnTomoDefocusSlope."""
    damaged: bool
    """Doses are given, but no B-factor that would describe their effect."""


def files_of_set(source: Path, blocks: dict[str, Columns]) -> tuple[Path, Path]:
    """(particles, tomograms) that an optimisation set names."""
    columns = next(c for c in blocks.values() if "rlnTomoParticlesFile" in c)
    if "rlnTomoTomogramsFile" not in columns:
        raise SourceError(f"{source}: column rlnTomoTomogramsFile is missing; give the particles' own STAR file")
    particles, tomograms = (find_beside(str(columns[label][0]), source) for label in SET_LABELS)
    return particles, tomograms


def find_tomograms(source: Path) -> Path:
    """The tomograms of the particle file `source`: what an optimisation set beside it says, or by their usual names."""
    for path in sorted(source.parent.glob("*optimisation_set.star")):
        for columns in read_blocks(path, SET_LABELS).values():
            named = [Path(name).name for name in columns.get("rlnTomoParticlesFile", [])]
            if named == [source.name] and "rlnTomoTomogramsFile" in columns:
                return find_beside(columns["rlnTomoTomogramsFile"][0], path)
    for path in (source.with_name(f"{source.stem}_tomograms.star"), source.with_name("tomograms.star")):
        if path.is_file():
            return path
    raise SourceError(
        f"{source}: a tilt-series set, but no optimisation_set.star or tomograms.star lies beside it; "
        "give the tomograms' STAR file as tomograms"
    )


def read_series(tomograms: Path, names: Iterable[str]) -> tuple[dict[str, Series], list[Path]]:
    """The tilt series called `names`, and the files beside `tomograms` that they were read from.

    A series' table is a block of its name (Warp, RELION 4), or a file that rlnTomoTiltSeriesStarFile names (RELION 5).
    """
    blocks = read_blocks(tomograms, TOMOGRAM_LABELS | TILT_LABELS)
    listed = next((columns for columns in blocks.values() if "rlnTomoName" in columns), None)
    if listed is None:
        raise SourceError(f"{tomograms}: no column rlnTomoName; expected the STAR file that lists the tomograms")
    row_of = {name: row for row, name in enumerate(listed["rlnTomoName"])}
    series, files = {}, []
    for name in names:
        if name not in row_of:
            first = next(iter(row_of), "none")
            raise SourceError(f"{tomograms}: no tomogram {name}, which the particles name; it lists {first}, ...")
        tomogram = {label: cells[row_of[name]] for label, cells in listed.items()}
        if name in blocks:
            series[name] = _series(tomograms, tomograms, f"data_{name}", tomogram, blocks[name])
        elif "rlnTomoTiltSeriesStarFile" in tomogram:
            files.append(find_beside(tomogram["rlnTomoTiltSeriesStarFile"], tomograms))
            tilts = [b for b in read_blocks(files[-1], TILT_LABELS).values() if "rlnDefocusU" in b]
            series[name] = _series(tomograms, files[-1], "tilts", tomogram, tilts[0] if tilts else {})
        else:
            raise SourceError(f"{tomograms}: neither a block data_{name} nor a column rlnTomoTiltSeriesStarFile")
    return series, files


def _series(tomograms: Path, path: Path, block: str, tomogram: dict[str, str | float], tilts: Columns) -> Series:
    given = {label: _number(tomograms, tomogram, label) for label, kind in TOMOGRAM_LABELS.items() if kind is float}
    pixel_size = given["rlnTomoTiltSeriesPixelSize"]
    if not pixel_size or pixel_size < 0:
        raise SourceError(
            f"{tomograms}: rlnTomoTiltSeriesPixelSize is missing or not positive; RELION and Warp write it"
        )
    where = f"{path} ({block})"
    for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        if label not in tilts:
            raise SourceError(f"{where}: column {label} is missing; estimate the CTF of the tilt series first")
    count = len(tilts["rlnDefocusU"])
    ctf = [
        numbers(path, tilts, label) if label in tilts else np.full(count, default)
        for label, default in TILT_CTF.values()
    ]
    doses = numbers(path, tilts, "rlnMicrographPreExposure") if "rlnMicrographPreExposure" in tilts else np.zeros(count)
    b_factor = (given["rlnCtfBfactorPerElectronDose"] or 0.0) * doses
    size = [given[f"rlnTomoSize{axis}"] for axis in "XYZ"]
    hand, slope = given["rlnTomoHand"], given["rlnTomoDefocusSlope"]
    return Series(
        rotations=_rotations(path, where, tilts),
        ctf=np.stack([*ctf, b_factor], axis=1),
        centre_a=None if None in size else np.array(size, dtype=np.float64) / 2 * pixel_size,
        pixel_size_a=pixel_size,
        hand=(-1.0 if hand is None else hand) * (1.0 if slope is None else slope),  # -1 is RELION's default
        damaged=bool(doses.any() and not b_factor.any()),
    )


def _number(path: Path, tomogram: dict[str, str | float], label: str) -> float | None:
    if label not in tomogram:
        return None
    try:
        return float(tomogram[label])
    except ValueError:
        raise SourceError(f"{path}: {label} is {tomogram[label]!r}; a number is needed") from None


def _rotations(path: Path, where: str, tilts: Columns) -> NDArray[np.float64]:
    """[T, 3, 3] from the projection matrices, or from RELION 5's angles about the fixed x, y and z axes, in that order."""
    if "rlnTomoProjX" not in tilts:
        missing = [label for label in ("rlnTomoYTilt", "rlnTomoZRot") if label not in tilts]
        if missing:
            raise SourceError(
                f"{where}: column {missing[0]} is missing (or rlnTomoProjX, Y and Z); align the tilts first"
            )
        about_y, about_z = numbers(path, tilts, "rlnTomoYTilt"), numbers(path, tilts, "rlnTomoZRot")
        about_x = numbers(path, tilts, "rlnTomoXTilt") if "rlnTomoXTilt" in tilts else np.zeros(len(about_y))
        return Rotation.from_euler("xyz", np.stack([about_x, about_y, about_z], axis=1), degrees=True).as_matrix()
    rows = []
    for label in ("rlnTomoProjX", "rlnTomoProjY", "rlnTomoProjZ"):
        if label not in tilts:
            raise SourceError(f"{where}: column {label} is missing beside rlnTomoProjX")
        rows.append([row[:3] for row in vectors(path, tilts, label)])
    lengths = {len(row) for label_rows in rows for row in label_rows}
    if lengths != {3}:
        raise SourceError(f"{where}: rows of rlnTomoProj with {min(lengths)} numbers; expected [x,y,z,shift]")
    matrices = np.array(rows).transpose(1, 0, 2)
    matrices /= np.linalg.norm(matrices, axis=2, keepdims=True)  # a projection matrix may also scale to binned pixels
    wrong = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    wrong = np.where(np.linalg.det(matrices) > 0, wrong, np.inf)
    if not wrong.max() < 1e-3:
        raise SourceError(
            f"{where}: tilt {int(np.argmax(wrong)) + 1}: rlnTomoProjX, Y, Z are not the rows of a rotation"
        )
    return matrices
