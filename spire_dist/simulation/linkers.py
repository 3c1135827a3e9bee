"""States that differ by a random linker: a part hangs on a chain without structure, which lies differently in each.

The linker's trace (its CA or P atoms) is drawn as a random coil from the fixed residue it grows from, the part at its other
end in a random orientation; what collides is thrown away and drawn anew, so that all that fits is equally likely. A
coil of hard spheres, no force field. Called by `simulate.simulate`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from spire_dist.errors import ConfigError
from spire_dist.simulation.molecules import Molecule, select
from spire_dist.simulation.states import States, centred

ANGLES_DEG = 85.0, 150.0
"""Between two virtual bonds of a protein: what sequences without structure have."""
CLASH_A = 4.0
"""Representative atoms that are not neighbours along the chain come no closer."""
TRIES = 20_000

Points = NDArray[np.float64]


class Joint(NamedTuple):
    """What joins the moving part to the rest."""

    trace: NDArray[np.int64]
    """Atoms along the chain: two of the rest, those of the linker, two of the moving part."""
    residues: list[NDArray[np.int64]]
    """The atoms of each residue of the linker, in the order of the trace."""
    moving: NDArray[np.bool_]
    linker: NDArray[np.bool_]


def random_linkers(molecule: Molecule, moving: str, linker: str, count: int, seed: int) -> States:
    """`count` states: `moving` (a selection) stiff in random places, held to the rest by the residues of `linker`.

    Lengths of virtual bonds are the model's, angles between them within `ANGLES_DEG`. State k depends on seed and k only.

    Raises ConfigError where the linker does not join the two, or nothing that fits is found.
    """
    joint = _joint(molecule, moving, linker)
    rest = molecule.representative & ~joint.moving & ~joint.linker
    anchor = joint.trace[1]
    obstacles = KDTree(molecule.coordinates[rest])
    beyond_bond = KDTree(molecule.coordinates[rest & (np.arange(len(rest)) != anchor)])
    coordinates = np.repeat(molecule.coordinates[None], count, axis=0)
    for state in range(count):
        rng = np.random.default_rng([seed, 4, state])
        for _ in range(TRIES):
            placed = _placed(molecule, joint, rng, obstacles, beyond_bond)
            if placed is not None:
                break
        else:
            raise ConfigError(
                f"linker {linker!r}: no place for {moving!r} without a clash in {TRIES:,} tries (state {state}); "
                "choose a longer linker or a smaller part"
            )
        coordinates[state] = placed
    group = joint.moving + 2 * joint.linker
    return centred(
        molecule,
        coordinates,
        np.ones((count, len(group)), dtype=bool),
        group.astype(np.int64),
        ("fixed", moving, linker),
    )


def _joint(molecule: Molecule, moving: str, linker: str) -> Joint:
    """The chain through the linker, from the rest to the moving part, whichever comes first in the file."""
    part, between = select(molecule, moving), select(molecule, linker)
    if (part & between).any():
        raise ConfigError(f"linker {linker!r}: overlaps the moving part {moving!r}; name other residues")
    chains = set(molecule.chains[between].tolist())
    chain = np.flatnonzero(molecule.representative & (molecule.chains == molecule.chains[between][0]))
    inside = np.flatnonzero(between[chain])
    if len(chains) != 1 or len(inside) == 0 or np.ptp(inside) + 1 != len(inside):
        raise ConfigError(f"linker {linker!r}: not one stretch of one chain; write chain:first-last, as in H:232-238")
    first, last = inside[0] - 2, inside[-1] + 3
    trace = chain[max(first, 0) : last]
    if first < 0 or len(trace) != len(inside) + 4:
        raise ConfigError(f"linker {linker!r}: too near an end of its chain; two residues must follow on either side")
    if part[trace[0]]:
        trace = trace[::-1]
    if part[trace].tolist() != [False, False, *[False] * len(inside), True, True]:
        raise ConfigError(
            f"linker {linker!r}: does not join the moving part {moving!r} to the rest; its neighbours on one side must "
            "be in the moving part, on the other not"
        )
    numbers = molecule.residues[trace[2:-2]]
    if len(set(numbers.tolist())) != len(numbers):
        raise ConfigError(f"linker {linker!r}: has residues of one number (insertions); renumber them")
    return Joint(trace, [np.flatnonzero(between & (molecule.residues == n)) for n in numbers], part, between)


def _placed(
    molecule: Molecule, joint: Joint, rng: np.random.Generator, obstacles: KDTree, beyond_bond: KDTree
) -> Points | None:
    """Coordinates [A, 3] of one try; None where something collides."""
    model = molecule.coordinates
    before, after = model[joint.trace], model[joint.trace].copy()
    for i in range(2, len(after) - 1):  # the last one is stiff in the moving part
        length = np.linalg.norm(before[i] - before[i - 1])
        after[i] = after[i - 1] + length * _next_direction(after[i - 2], after[i - 1], rng)
    linker = after[2:-2]
    if _nearest(beyond_bond, linker) < CLASH_A:
        return None
    turn = Rotation.random(rng=rng)
    after[-1] = turn.apply(before[-1] - before[-2]) + after[-2]
    apart = np.linalg.norm(after[:, None] - after, axis=-1)[np.triu_indices(len(after), 2)]
    if not ANGLES_DEG[0] <= _angle_deg(*after[-3:]) <= ANGLES_DEG[1] or apart.min() < CLASH_A:
        return None
    moved = turn.apply(model[joint.moving] - before[-2]) + after[-2]
    standing_for = moved[molecule.representative[joint.moving]]
    if _nearest(obstacles, standing_for) < CLASH_A:
        return None
    beyond_end = standing_for[np.linalg.norm(standing_for - after[-2], axis=1) > 0.1]
    if _nearest(KDTree(beyond_end), linker) < CLASH_A:
        return None
    placed = model.copy()
    placed[joint.moving] = moved
    for i, atoms in enumerate(joint.residues, start=2):
        turned = _frame(*after[i - 1 : i + 2]) @ _frame(*before[i - 1 : i + 2]).T
        placed[atoms] = (model[atoms] - before[i]) @ turned.T + after[i]
    return placed


def _next_direction(previous: Points, here: Points, rng: np.random.Generator) -> Points:
    """A unit vector, uniform on the belt of the sphere whose angle with the last bond is allowed."""
    back = (previous - here) / np.linalg.norm(previous - here)
    low, high = np.cos(np.radians(ANGLES_DEG))
    cosine = rng.uniform(high, low)
    across = rng.standard_normal(3)
    across -= across @ back * back
    return cosine * back + np.sqrt(1 - cosine**2) * across / np.linalg.norm(across)


def _angle_deg(a: Points, b: Points, c: Points) -> float:
    """The angle at b."""
    first, second = a - b, c - b
    return float(np.degrees(np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))))


def _nearest(tree: KDTree, points: Points) -> float:
    return float(tree.query(points, distance_upper_bound=2 * CLASH_A)[0].min())


def _frame(previous: Points, here: Points, following: Points) -> Points:
    """Axes [3, 3], in columns, that three points along a chain span."""
    along = (following - previous) / np.linalg.norm(following - previous)
    out = here - previous - (here - previous) @ along * along
    out = out / np.linalg.norm(out)
    return np.stack([along, out, np.cross(along, out)], axis=1)
