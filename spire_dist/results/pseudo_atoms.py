"""Gaussians as pseudo-atoms for ChimeraX (one mmCIF atom each, chain = part), and a script that colours them."""

from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from spire_dist.files import replacing

PART_COLOURS = (
    "#4f9dea", "#f2a03d", "#57c08b", "#e4657a", "#a585e6", "#3fc6cf", "#d888bd", "#bdb44e", "#8fa3b8", "#c9825a",
)  # fmt: skip
"""Told apart on light and dark ground and by most colour-blind eyes; the tenth part after the first starts again."""


def part_colour(index: int) -> str:
    """The colour of the index-th part, everywhere the same."""
    return PART_COLOURS[index % len(PART_COLOURS)]


def chain_names(count: int) -> list[str]:
    """A, B, ..., Z, AA, AB, ...: the chain of each part."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = list(letters)
    while len(names) < count:
        names += [a + b for a in names[-26:] for b in letters]
    return names[:count]


def write_pseudo_atoms(
    path: Path, frames: NDArray, amplitudes: NDArray, parts: NDArray, box: int, pixel_size: float
) -> None:
    """Write Gaussians as mmCIF: a model per frame, a chain per part, an atom per Gaussian.

    frames      [F, G, 3] Å from the middle of the box; written in the frame of the maps (voxel 0 at 0, middle at
                box // 2 × pixel_size), so that atoms lie on the map
    amplitudes  [F, G]; the occupancy column is their share of the largest
    parts       [G]; the B-factor column is the part

    Atoms have the same order in every model, so ChimeraX can play them as one trajectory.
    """
    found = np.unique(parts)
    names = chain_names(len(found))
    structure = gemmi.Structure()
    structure.name = "gaussians"
    shown = np.clip(amplitudes / max(float(np.abs(amplitudes).max()), 1e-12), 0, 1)
    shifted = frames + box // 2 * pixel_size
    for number, (positions, occupancy) in enumerate(zip(shifted, shown, strict=True), start=1):
        model = gemmi.Model(number)
        for name, part in zip(names, found, strict=True):
            chain = gemmi.Chain(name)
            for within, index in enumerate(np.flatnonzero(parts == part), start=1):
                residue = gemmi.Residue()
                residue.name, residue.het_flag = "GAU", "H"
                residue.seqid = gemmi.SeqId(str(within))
                residue.subchain = name
                residue.entity_type = gemmi.EntityType.NonPolymer
                atom = gemmi.Atom()
                atom.name, atom.element = "C", gemmi.Element("C")
                atom.pos = gemmi.Position(*positions[index].tolist())
                atom.occ, atom.b_iso = float(occupancy[index]), float(part)
                residue.add_atom(atom)
                chain.add_residue(residue)
            model.add_chain(chain)
        structure.add_model(model)
    structure.assign_serial_numbers()
    with replacing(path) as partial:
        partial.write_text(structure.make_mmcif_document().as_string())


def write_chimerax_script(
    path: Path, atoms: str, parts: NDArray, radius: float, maps: Sequence[str], level: float
) -> None:
    """A .cxc script beside the files it opens: pseudo-atoms coloured by part, the maps of the path as a series.

    atoms and maps are names relative to the script; radius in Å, contour level in the maps' density.
    """
    lines = [
        "# Gaussians coloured by part, and the maps along the path: drag it into ChimeraX",
        f"open {atoms} coordsets true",
    ]
    lines += ["style #1 sphere", f"size #1 atomRadius {radius:.2f}"]
    for index, name in enumerate(chain_names(len(np.unique(parts)))):
        lines.append(f"color #1/{name} {part_colour(index)}")
    if maps:
        lines.append(f"open {' '.join(maps)} vseries true")
        lines += [f"volume #2 level {level:.5g}", "transparency #2 60", "vseries slider #2", "coordset slider #1"]
    lines += ["lighting soft", "view"]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
