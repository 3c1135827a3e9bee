"""Tilt series as 2-D particles: one image for each tilt that shows a particle (RELION 5, Warp). Called by `relion.py`.

RELION's conventions: the angles give r_tomogram = A_subtomogram A r_particle, the tilt's projection matrix P takes
tomogram to image, and the particle lies at the extraction centre minus A_subtomogram · origin. So an image has the
rotation P A_subtomogram A and the shift -(P A_subtomogram origin) in x and y. Its defocus is the tilt's plus
rlnTomoHand · (depth of the particle below the tomogram's centre along P's z axis, in Å).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
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
    **dict.fromkeys([f"rlnCoordinate{axis}" for axis in "XYZ"], float),
}


def one_image_for_each_tilt(
    table: ParticleTable, particles: Columns, origins_a: NDArray[np.float64], tomograms: Path | None, no_ctf: bool
) -> ParticleTable:
    """`table`, which has a row for each particle, with a row for each tilt that shows it, in the series' order.

    origins_a  [N, 3], Å, in the tomogram (before A_subtomogram), rlnOriginX/Y/ZAngst
    """
    source = table.source
    tomograms = tomograms or find_tomograms(source)
    names = particles["rlnTomoName"]
    series, files = read_series(tomograms, dict.fromkeys(names))
    visible = [flags != 0 for flags in vectors(source, particles, "rlnTomoVisibleFrames")]
    for row, (flags, name) in enumerate(zip(visible, names, strict=True)):
        if len(flags) != len(series[name].ctf):
            raise SourceError(
                f"{source}: rlnTomoVisibleFrames has {len(flags)} entries in row {row + 1}, "
                f"{name} has {len(series[name].ctf)} tilts"
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
    positions_a = _positions_a(source, particles, series, table.pixel_size_a)

    count = len(particle)
    to_image, ctf = np.empty((count, 3, 3)), table.ctf[particle]
    tilts = np.stack([tilt, np.empty_like(tilt)], axis=1).astype(np.int32)
    columns = [CTF_COLUMNS.index(name) for name in (*TILT_CTF, "b_factor_a2")]
    for name, of in series.items():
        mine = np.flatnonzero(names[particle] == name)
        to_image[mine] = of.rotations[tilt[mine]]
        of_tilt = of.ctf[tilt[mine]]
        if positions_a is not None:
            depth_a = np.einsum("nj,nj->n", to_image[mine, 2], (positions_a - origins_a)[particle[mine]])
            of_tilt[:, :2] += of.hand * depth_a[:, None]
        if not no_ctf:
            ctf[mine[:, None], columns] = of_tilt
        tilts[mine, 1] = len(of.ctf)

    ignored = set(table.ignored)
    if positions_a is None and not no_ctf:
        ignored.add("defocus at the particle's depth")
    if any(of.damaged for of in series.values()):
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
        tilt=tilts,
        ignored=sorted(ignored),
        also_read=[*table.also_read, tomograms, *files],
    )


def _positions_a(
    source: Path, particles: Columns, series: dict[str, Series], pixel_sizes_a: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """[N, 3], Å from the tomogram's centre; None where the file does not tell.

    RELION 5 states them so. In rlnCoordinateX/Y/Z, RELION 4 counts pixels of the tilt series and Warp those of the
    images, which are larger: they are taken for the larger where all positions then lie within their tomograms.
    """
    if all(f"rlnCenteredCoordinate{axis}Angst" in particles for axis in "XYZ"):
        return np.stack([numbers(source, particles, f"rlnCenteredCoordinate{axis}Angst") for axis in "XYZ"], axis=1)
    if not all(f"rlnCoordinate{axis}" in particles for axis in "XYZ"):
        return None
    of = [series[name] for name in particles["rlnTomoName"]]
    if any(one.centre_a is None for one in of):
        return None
    coordinates = np.stack([numbers(source, particles, f"rlnCoordinate{axis}") for axis in "XYZ"], axis=1)
    centres_a = np.array([one.centre_a for one in of])
    positions_a = coordinates * pixel_sizes_a[:, None]
    if (positions_a > 2 * centres_a).any():
        positions_a = coordinates * np.array([one.pixel_size_a for one in of])[:, None]
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
