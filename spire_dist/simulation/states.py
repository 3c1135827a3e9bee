"""The states of a molecule: a part turned about an axis, blocks left out, or other molecules altogether.

A state is a set of coordinates and a set of atoms that are there. Called by `simulate.simulate`; states that differ by a
random linker are drawn in `linkers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from spire_dist.errors import ConfigError
from spire_dist.simulation.molecules import Molecule, select


@dataclass(frozen=True, kw_only=True)
class States:
    """A molecule in S states; the centre of mass of their average is the origin, of a mixture that of each state."""

    molecule: Molecule
    coordinates: NDArray[np.float64]
    """[S, A, 3], Å; one and the same memory for all states where no atom moves."""
    present: NDArray[np.bool_]
    """[S, A]; False where the state lacks the atom."""
    group: NDArray[np.int64]
    """[A]; 0 = fixed and always there, k = the k-th part that moves or comes and goes."""
    group_names: tuple[str, ...]

    def atoms(self, state: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coordinates [n, 3] Å and weights [n] electrons of the atoms that the state has."""
        there = self.present[state]
        return self.coordinates[state, there], self.molecule.weights[there]


def turning_states(molecule: Molecule, moving: str, axis: NDArray[np.float64], count: int) -> States:
    """`count` states with the selection `moving` turned about `axis` [2, 3] in equal steps of a full turn."""
    chosen = select(molecule, moving)
    origin, direction = axis[0], (axis[1] - axis[0]) / np.linalg.norm(axis[1] - axis[0])
    coordinates = np.repeat(molecule.coordinates[None], count, axis=0)
    for state in range(count):
        turn = Rotation.from_rotvec(2 * np.pi * state / count * direction)
        coordinates[state, chosen] = turn.apply(molecule.coordinates[chosen] - origin) + origin
    present = np.ones((count, len(chosen)), dtype=bool)
    return centred(molecule, coordinates, present, chosen.astype(np.int64), ("fixed", moving))


def assembly_states(molecule: Molecule, omit: Sequence[str]) -> States:
    """One state for each selection of `omit`, which that state lacks; an empty one leaves the molecule whole.

    Atoms that come and go together are one group, named after the states that lack it.
    """
    present = np.array(
        [~select(molecule, o) if o.strip() else np.ones(len(molecule.weights), dtype=bool) for o in omit]
    )
    for state, there in enumerate(present):
        if not there.any():
            raise ConfigError(
                f"omit {omit[state]!r}: leaves nothing of the molecule in state {state}; omit fewer chains"
            )
    patterns, group = np.unique(~present, axis=1, return_inverse=True)  # patterns [S, G], the all-False one sorts first
    names = ["absent in " + " ".join(map(str, np.flatnonzero(p))) if p.any() else "fixed" for p in patterns.T]
    if names[0] != "fixed":
        names, group = ["fixed", *names], group + 1
    coordinates = np.broadcast_to(molecule.coordinates, (len(omit), *molecule.coordinates.shape))
    return centred(molecule, coordinates, present, group.reshape(-1).astype(np.int64), tuple(names))


def mixture_states(complexes: Sequence[Molecule], names: Sequence[str]) -> States:
    """One state for each of several molecules, which has nothing of the others; each about its own centre of mass."""
    sizes = [len(one.weights) for one in complexes]
    own = np.repeat(np.arange(len(complexes)), sizes)  # [A]: the state that has the atom
    centres = [one.weights @ one.coordinates / one.weights.sum() for one in complexes]
    union = Molecule(
        coordinates=np.concatenate([one.coordinates - c for one, c in zip(complexes, centres, strict=True)]),
        weights=np.concatenate([one.weights for one in complexes]),
        chains=np.concatenate([one.chains for one in complexes]),
        residues=np.concatenate([one.residues for one in complexes]),
        representative=np.concatenate([one.representative for one in complexes]),
    )
    return States(
        molecule=union,
        coordinates=np.broadcast_to(union.coordinates, (len(complexes), *union.coordinates.shape)),
        present=own == np.arange(len(complexes))[:, None],
        group=own + 1,
        group_names=("fixed", *names),
    )


def centred(molecule, coordinates, present, group, names) -> States:
    """Move everything by one vector, so that the states keep their common frame; memory that they share stays shared."""
    mass = present * molecule.weights  # [S, A]
    centre = np.einsum("sa,sax->x", mass, coordinates) / mass.sum()
    molecule = replace(molecule, coordinates=molecule.coordinates - centre)
    if coordinates.strides[0] == 0:
        coordinates = np.broadcast_to(coordinates[0] - centre, coordinates.shape)
    else:
        coordinates = coordinates - centre
    return States(molecule=molecule, coordinates=coordinates, present=present, group=group, group_names=names)
