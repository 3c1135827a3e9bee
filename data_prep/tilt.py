"""Tilt series as 2-D particles: one image for each tilt that shows a particle (RELION 5, Warp). Called by `relion.py`.

RELION's conventions: the angles give r_tomogram = A_subtomogram A r_particle, the tilt's projection matrix P takes
tomogram to image, and the particle lies at the extraction centre minus A_subtomogram · origin. So an image has the
rotation P A_subtomogram A and the shift -(P A_subtomogram origin) in x and y. Its defocus is the tilt's plus
rlnTomoHand · (depth of the particle below the tomogram's centre along P's z axis, in Å).
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.table import ParticleTable
from data_prep.tomograms import TILT_CTF, Series, find_tomograms, read_series
from spire_dist.errors import SourceError
from spire_dist.physics.poses import matrices_from_relion_angles
from spire_dist.schema import CTF_COLUMNS
from spire_dist.star import Columns, numbers, vectors

PARTICLE_LABELS: dict[str, type] = {
    **dict.fromkeys(["rlnTomoName", "rlnTomoVisibleFrames"], str),
    **dict.fromkeys([f"rlnTomoSubtomogram{angle}" for angle in ("Rot", "Tilt", "Psi")], float),
    **dict.fromkeys([f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"], float),
    **dict.fromkeys([f"rlnCoordinate{axis}" for axis in "XYZ"], np.float32),
}


def one_image_for_each_tilt(
    table: ParticleTable, particles: Columns, origins_a: NDArray[np.float64], tomograms: Path | None, no_ctf: bool
) -> ParticleTable:
    """`table`, which has a row for each particle, with a row for each tilt that shows it, in the series' order.

    origins_a  [N, 3], Å, in the tomogram (before A_subtomogram), rlnOriginX/Y/ZAngst
    """
    source = table.source
    tomograms = tomograms or find_tomograms(source)
    code, names = pd.factorize(particles["rlnTomoName"])
    by_name, files = read_series(tomograms, names)
    series = list(by_name.values())
    tilts = np.array([len(one.ctf) for one in series])
    visible = [flags != 0 for flags in vectors(source, particles, "rlnTomoVisibleFrames")]
    for row, (flags, of) in enumerate(zip(visible, code, strict=True)):
        if len(flags) != tilts[of]:
            raise SourceError(
                f"{source}: rlnTomoVisibleFrames has {len(flags)} entries in row {row + 1}, "
                f"{names[of]} has {tilts[of]} tilts"
            )
    particle = np.repeat(np.arange(len(table)), [flags.sum() for flags in visible])
    if not particle.size:
        raise SourceError(f"{source}: rlnTomoVisibleFrames shows no particle in any tilt")
    tilt = np.concatenate([np.flatnonzero(flags) for flags in visible])

    subtomogram = np.tile(np.eye(3), (len(table), 1, 1))
    if "rlnTomoSubtomogramRot" in particles:
        angles = (numbers(source, particles, f"rlnTomoSubtomogram{angle}") for angle in ("Rot", "Tilt", "Psi"))
        subtomogram = matrices_from_relion_angles(*angles).astype(np.float64)
    origins_a = np.einsum("nij,nj->ni", subtomogram, origins_a)
    positions_a = _positions_a(source, particles, series, code, table.pixel_size_a)

    of = code[particle]  # each image's series
    place = (np.cumsum(tilts) - tilts)[of] + tilt  # its place among the tilts of all series
    to_image = np.concatenate([one.rotations for one in series])[place]
    ctf = table.ctf[particle]
    if not no_ctf:
        of_tilt = np.concatenate([one.ctf for one in series])[place]
        if positions_a is not None:
            depth_a = np.einsum("nj,nj->n", to_image[:, 2], (positions_a - origins_a)[particle])
            of_tilt[:, :2] += (np.array([one.hand for one in series])[of] * depth_a)[:, None]
        ctf[:, [CTF_COLUMNS.index(name) for name in (*TILT_CTF, "b_factor_a2")]] = of_tilt

    ignored = set(table.ignored)
    if positions_a is None and not no_ctf:
        ignored.add("defocus at the particle's depth")
    if any(one.damaged for one in series):
        ignored.add("radiation damage")
    rotations = shifts_a = None
    if table.rotations is not None:
        rotations = (to_image @ (subtomogram @ table.rotations)[particle]).astype(np.float32)
        shifts_a = -np.einsum("nij,nj->ni", to_image[:, :2], origins_a[particle]).astype(np.float32)
    rank = np.concatenate([np.arange(flags.sum()) for flags in visible])
    return replace(
        table,
        image_file=table.image_file[particle],
        slice_index=rank,
        rotations=rotations,
        shifts_a=shifts_a,
        ctf=ctf,
        optics_group=table.optics_group[particle],
        pixel_size_a=table.pixel_size_a[particle],
        stated_box=None if table.stated_box is None else table.stated_box[particle],
        source_index=table.source_index[particle],
        tilt=np.stack([tilt, tilts[of]], axis=1).astype(np.int32),
        ignored=sorted(ignored),
        also_read=[*table.also_read, tomograms, *files],
    )


def _positions_a(
    source: Path, particles: Columns, series: list[Series], code: NDArray[np.intp], pixel_sizes_a: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """[N, 3], Å from the tomogram's centre; None where the file does not tell. `code` [N] is each particle's series.

    RELION 5 states them so. In rlnCoordinateX/Y/Z, RELION 4 counts pixels of the tilt series and Warp those of the
    images, which are larger: they are taken for the larger where all positions then lie within their tomograms, and a
    line says which was taken.
    """
    centred, in_pixels = (
        [f"rln{name}{axis}{unit}" for axis in "XYZ"]
        for name, unit in (("CenteredCoordinate", "Angst"), ("Coordinate", ""))
    )
    if all(label in particles for label in centred):
        return np.stack([numbers(source, particles, label) for label in centred], axis=1)
    if not all(label in particles for label in in_pixels) or any(one.centre_a is None for one in series):
        return None
    coordinates = np.stack([numbers(source, particles, label) for label in in_pixels], axis=1)
    centres_a = np.array([one.centre_a for one in series])[code]
    positions_a = coordinates * pixel_sizes_a[:, None]
    outside = np.flatnonzero((positions_a > 2 * centres_a).any(axis=1))
    if outside.size:
        positions_a = coordinates * np.array([one.pixel_size_a for one in series])[code, None]
        unit = f"tilt series: in those of the images, row {outside[0] + 1} would lie outside its tomogram"
    else:
        unit = "images, in which all particles lie within their tomograms"
    print(f"{source}: rlnCoordinateX, Y, Z are taken for pixels of the {unit}", file=sys.stderr)
    return positions_a - centres_a


def with_slices(table: ParticleTable, counts: NDArray[np.int64]) -> ParticleTable:
    """`table` with the slices of its tilts, now that `counts`, the images in each of its stacks, are known.

    RELION writes the tilts that show the particle, Warp all tilts of the series. Other tables are returned as they are.
    """
    if table.tilt is None:
        return table
    shown = np.bincount(table.image_file, minlength=len(counts))[table.image_file]
    held, all_tilts = np.asarray(counts)[table.image_file], table.tilt[:, 1]
    wrong = np.flatnonzero((held != shown) & (held != all_tilts))
    if wrong.size:
        row = wrong[0]
        raise SourceError(
            f"{table.source}: row {table.source_index[row] + 1}: {table.image_paths[table.image_file[row]]} has {held[row]} "
            f"images; expected {shown[row]} (the visible tilts) or {all_tilts[row]} (all tilts)"
        )
    return replace(table, slice_index=np.where(held == all_tilts, table.tilt[:, 0], table.slice_index))
