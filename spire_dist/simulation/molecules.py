"""Molecules to simulate: atomic models read with gemmi, or an antibody-like one made on the spot.

Called by `simulate.simulate`, which puts them into states (`states`). Numpy and gemmi only.

A selection names chains and residues: `H:1-213,L` is residues 1 to 213 of chain H and the whole of chain L. Where
several files make one molecule, a chain is called after its file: `RNA1.A`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from spire_dist.errors import ConfigError, SourceError

REPRESENTATIVE_ATOMS = (("CA", gemmi.Element("C")), ("P", gemmi.Element("P")))
"""The atom that stands for its residue in a protein, else in a nucleic acid."""
SELECTION = re.compile(r"(?P<chain>[^:,\s]+)(:(?P<first>-?\d+)(-(?P<last>-?\d+))?)?")


@dataclass(frozen=True, kw_only=True)
class Molecule:
    """Atoms as arrays of one length A."""

    coordinates: NDArray[np.float64]
    """[A, 3], Å, (x, y, z)."""
    weights: NDArray[np.float64]
    """[A], electrons: the integral of the atom's density."""
    chains: NDArray[np.str_]
    residues: NDArray[np.int64]
    representative: NDArray[np.bool_]
    """One atom of each residue: CA, P or the bead itself."""


def read_molecule(paths: Sequence[Path]) -> Molecule:
    """Atoms of the first model of PDB or mmCIF files (.gz too) in their common frame; no hydrogens, no water.

    Of alternative conformations the first counts, and every atom in full, whatever its occupancy.

    Raises SourceError where a file is missing, is not an atomic model or holds no atoms.
    """
    coordinates, weights, chains, residues, representative = [], [], [], [], []
    for path in paths:
        prefix = f"{path.name.split('.')[0]}." if len(paths) > 1 else ""
        for chain, residue, atom in _heavy_atoms(path):
            coordinates.append(atom.pos.tolist())
            weights.append(atom.element.atomic_number)
            chains.append(prefix + chain.name)
            residues.append(residue.seqid.num)
            stands_for = next(
                (name for name, element in REPRESENTATIVE_ATOMS if residue.find_atom(name, "*", element)), ""
            )
            representative.append(atom.name == stands_for)
    return Molecule(
        coordinates=np.array(coordinates),
        weights=np.array(weights),
        chains=np.array(chains),
        residues=np.array(residues),
        representative=np.array(representative),
    )


def _heavy_atoms(path: Path) -> list[tuple[gemmi.Chain, gemmi.Residue, gemmi.Atom]]:
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give an atomic model (.pdb, .cif, either may be .gz)")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"{path}: not an atomic model that gemmi can read ({error}); give .pdb or .cif") from error
    structure.remove_alternative_conformations()
    structure.remove_hydrogens()
    structure.remove_waters()
    atoms = [] if len(structure) == 0 else [(c, r, a) for c in structure[0] for r in c for a in r]
    if not atoms:
        raise SourceError(f"{path}: holds 0 atoms; give an atomic model with coordinates")
    return atoms


DOMAIN_RADII = np.array([24.0, 16.0, 21.0])
PROCEDURAL_ARM, PROCEDURAL_AXIS = "A", ((0.0, 0.0, 0.0), (0.5, 0.0, 1.0))
"""What moves in `procedural_antibody`, and two points, Å, on the axis it turns about: 33° from the arm."""


def procedural_antibody(seed: int) -> Molecule:
    """An antibody-like particle of about 1,300 beads, one per residue: chain F (the stem), A and B (the arms).

    Each part is two globular domains in a row, 80 Å long; the arms leave the hinge 60° to either side. Beads fill a
    domain at the density of protein (135 Å³ per residue), jittered so that it has an inside. No two domains are alike,
    so that every pose looks different.
    """
    rng = np.random.default_rng([seed, 0])
    arm, stem = np.array([30.0, 70.0]), np.array([18.0, 54.0])  # distance of the two domains from the hinge, Å
    beads, chains, residues = [], [], []
    for chain, distances, tilt_deg in (("F", stem, 180.0), ("A", arm, 60.0), ("B", arm, -60.0)):
        turn = Rotation.from_euler("y", tilt_deg, degrees=True)
        domains = [_globule(rng, rng.uniform(0.85, 1.15, 3) * DOMAIN_RADII) + np.array([0, 0, d]) for d in distances]
        points = turn.apply(np.concatenate(domains))
        beads.append(points)
        chains.append(np.full(len(points), chain))
        residues.append(np.arange(1, len(points) + 1))
    coordinates = np.concatenate(beads)
    return Molecule(
        coordinates=coordinates,
        weights=rng.uniform(30.0, 75.0, len(coordinates)),  # electrons from glycine to tryptophan, roughly
        chains=np.concatenate(chains),
        residues=np.concatenate(residues),
        representative=np.ones(len(coordinates), dtype=bool),
    )


def _globule(rng: np.random.Generator, radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jittered lattice points inside an ellipsoid with the given half axes, Å."""
    spacing = 135.0 ** (1 / 3)
    reach = np.ceil(radii / spacing).astype(int)
    lattice = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    points = spacing * (lattice + rng.uniform(-0.35, 0.35, lattice.shape))
    return points[np.sum((points / radii) ** 2, axis=1) < 1]


def select(molecule: Molecule, selection: str) -> NDArray[np.bool_]:
    """Atoms [A] of a selection such as `H:1-213,L`. Raises ConfigError where it cannot be read or names nothing."""
    chosen = np.zeros(len(molecule.weights), dtype=bool)
    for term in filter(None, (t.strip() for t in selection.split(","))):
        match = SELECTION.fullmatch(term)
        if match is None:
            raise ConfigError(
                f"selection {selection!r}: cannot read {term!r}; write chain, chain:residue or chain:first-last"
            )
        here = molecule.chains == match["chain"]
        if not here.any():
            known = ", ".join(sorted(set(molecule.chains.tolist())))
            raise ConfigError(f"selection {selection!r}: no chain {match['chain']!r}; the model has {known}")
        if match["first"] is not None:
            first, last = int(match["first"]), int(match["last"] or match["first"])
            inside = here & (molecule.residues >= first) & (molecule.residues <= last)
            if not inside.any():
                span = f"{molecule.residues[here].min()}-{molecule.residues[here].max()}"
                raise ConfigError(
                    f"selection {selection!r}: {term!r} holds no atoms; chain {match['chain']} has residues {span}"
                )
            here = inside
        chosen |= here
    if not chosen.any():
        raise ConfigError(f"selection {selection!r}: names no atoms; write for example H:1-213,L")
    return chosen


def axis_points(molecule: Molecule, axis: str) -> NDArray[np.float64]:
    """Two points [2, 3], Å, of an axis written `H:213,H:244`: the CA (or P) atoms of two residues."""
    points = []
    for term in axis.split(","):
        atoms = np.flatnonzero(select(molecule, term) & molecule.representative)
        if len(atoms) != 1:
            raise ConfigError(
                f"axis {axis!r}: {term!r} names {len(atoms)} residues with a CA or P atom; name one, as in H:213"
            )
        points.append(molecule.coordinates[atoms[0]])
    if len(points) != 2 or np.allclose(points[0], points[1]):
        raise ConfigError(f"axis {axis!r}: {len(points)} points; name two different residues, as in H:213,H:244")
    return np.array(points)
