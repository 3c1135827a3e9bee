"""States with a random linker, against what is known of a chain: lengths, angles, stiffness, room."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist

from spire_dist.errors import ConfigError
from spire_dist.simulation.linkers import ANGLES_DEG, CLASH_A, random_linkers
from spire_dist.simulation.molecules import Molecule, read_molecule, select

COUNT = 40


@pytest.fixture(scope="module")
def balls():
    """Two balls of 200 residues, F and the end of L, and between them six residues of L in a zigzag; two atoms each."""
    rng = np.random.default_rng(0)
    lattice = 6.0 * np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3), axis=-1).reshape(-1, 3).astype(float)
    ball = lattice[np.argsort(np.linalg.norm(lattice, axis=1))[:200]] + rng.uniform(-0.5, 0.5, (200, 3))
    ball = ball[np.argsort(ball[:, 0])]
    steps = np.arange(8)
    zigzag = np.stack([3.2 * steps, 2.05 * (steps % 2), 0 * steps], axis=1)
    chain = np.concatenate([ball - ball[-1] - [3.2, -2.05, 0], zigzag, ball - ball[0] + zigzag[-1] + [3.2, -2.05, 0]])
    residues = np.arange(1, len(chain) + 1)
    return Molecule(
        coordinates=np.repeat(chain, 2, axis=0) + np.tile([[0, 0, 0], [0.5, 1.0, -0.7]], (len(chain), 1)),
        weights=np.full(2 * len(chain), 6.0),
        chains=np.full(2 * len(chain), "L"),
        residues=np.repeat(residues, 2),
        representative=np.tile([True, False], len(chain)),
    )


@pytest.fixture(scope="module", params=["balls", "antibody", "from the other end"])
def case(request):
    """(molecule, moving, linker, residues of the trace from the rest's second to the moving part's, chain)."""
    if request.param == "antibody":
        path = request.getfixturevalue("shared_data") / "models/sarata00+SBI_Project/1hzh.pdb.gz"
        trace = [240, 239, 238, 237, 236, 235, 232, 230, 229]
        return read_molecule([path]), "H:1-230,L", "H:232-238", trace, "H"
    balls = request.getfixturevalue("balls")
    if request.param == "balls":
        return balls, "L:208-408", "L:202-207", [*range(200, 210)], "L"
    return balls, "L:1-201", "L:202-207", [*range(209, 199, -1)], "L"


@pytest.fixture(scope="module")
def states(case):
    return random_linkers(*case[:3], count=COUNT, seed=3)


def trace_of(case, coordinates):
    molecule, _, _, numbers, chain = case
    own = [
        np.flatnonzero((molecule.chains == chain) & (molecule.residues == n) & molecule.representative)[0]
        for n in numbers
    ]
    return coordinates[..., own, :]


def test_chain_keeps_its_bonds_and_bends_as_chains_do(case, states):
    bonds = np.diff(trace_of(case, states.coordinates), axis=1)
    lengths = np.linalg.norm(bonds, axis=-1)
    expected = np.linalg.norm(np.diff(trace_of(case, case[0].coordinates), axis=0), axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(expected, lengths.shape), atol=1e-9)
    assert 3.7 < expected.min() < expected.max() < 3.95
    cosines = -(bonds[:, 1:] * bonds[:, :-1]).sum(-1) / lengths[:, 1:] / lengths[:, :-1]
    angles = np.degrees(np.arccos(cosines))
    assert angles.min() >= ANGLES_DEG[0] - 1e-6
    assert angles.max() <= ANGLES_DEG[1] + 1e-6
    assert angles.std() > 10


def test_parts_are_stiff_and_the_rest_stands_still(case, states):
    molecule, moving, linker, _, _ = case
    part, between = select(molecule, moving), select(molecule, linker)
    assert np.ptp(states.coordinates[:, ~part & ~between], axis=0).max() == 0
    some = np.flatnonzero(part)[::20]
    inside = np.array([pdist(c[some]) for c in states.coordinates])
    np.testing.assert_allclose(inside, np.broadcast_to(inside[0], inside.shape), atol=1e-9)
    for number in np.unique(molecule.residues[between]):
        own = between & (molecule.residues == number)
        inside = np.array([pdist(c[own]) for c in states.coordinates])
        np.testing.assert_allclose(inside, np.broadcast_to(pdist(molecule.coordinates[own]), inside.shape), atol=1e-9)
    np.testing.assert_array_equal(states.group, part + 2 * between)
    assert states.group_names == ("fixed", moving, linker)


def test_no_hand_is_turned(case, states):
    """Stiff and yet a mirror image: the volume that four atoms span would change its sign."""
    part = np.flatnonzero(select(case[0], case[1]))
    corners = part[np.linspace(0, len(part) - 1, 4).astype(int)]
    volumes = np.linalg.det(states.coordinates[:, corners[1:]] - states.coordinates[:, corners[:1]])
    np.testing.assert_allclose(volumes, np.full(COUNT, volumes[0]), rtol=1e-6)


def test_nothing_collides(case, states):
    molecule, moving, linker, _, _ = case
    part, between = select(molecule, moving), select(molecule, linker)
    for coordinates in states.coordinates:
        bodies = [coordinates[molecule.representative & chosen] for chosen in (~part & ~between, between, part)]
        rest, chain, body = (KDTree(points) for points in bodies)
        assert rest.sparse_distance_matrix(body, CLASH_A).nnz == 0
        assert rest.sparse_distance_matrix(chain, CLASH_A).nnz == 1  # the bond
        assert body.sparse_distance_matrix(chain, CLASH_A).nnz == 1
        assert len(chain.query_pairs(CLASH_A)) == len(bodies[1]) - 1


def test_ends_are_at_many_distances_and_the_part_in_all_directions(case, states):
    trace = trace_of(case, states.coordinates)
    ends = np.linalg.norm(trace[:, 1] - trace[:, -2], axis=1)
    assert ends.std() > 1.5
    assert ends.max() < 3.9 * (len(case[3]) - 3)
    part = select(case[0], case[1])
    arms = states.coordinates[:, part].mean(axis=1) - trace[:, -2]
    directions = arms / np.linalg.norm(arms, axis=1)[:, None]
    assert (directions @ directions.T).min() < -0.5
    assert np.median(pdist(arms)) > 0.5 * np.linalg.norm(arms, axis=1).mean()


def test_states_come_from_the_seed_one_by_one(case):
    first, again, more, other = (
        random_linkers(*case[:3], count=n, seed=s) for n, s in ((3, 3), (3, 3), (5, 3), (3, 4))
    )
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    shift = more.coordinates[0, 0] - first.coordinates[0, 0]  # the mean of five states is another
    np.testing.assert_allclose(more.coordinates[:3] - shift, first.coordinates, atol=1e-9)
    assert np.abs(pdist(other.coordinates[0][::50]) - pdist(first.coordinates[0][::50])).max() > 1


@pytest.mark.parametrize(
    ("moving", "linker", "words"),
    [
        ("L:208-408", "L:202-208", ["overlaps", "L:208-408"]),
        ("L:208-408", "L:202-204,L:206-207", ["not one stretch"]),
        ("L:208-408", "L:202-206", ["does not join", "L:208-408"]),
        ("L:1-201,L:208-408", "L:202-207", ["does not join"]),
        ("L:403-407", "L:408", ["too near an end"]),
    ],
)
def test_linker_that_joins_nothing_is_refused(balls, refusal, moving, linker, words):
    refusal(ConfigError, ["linker", *words], lambda: random_linkers(balls, moving, linker, 2, 0))


def test_part_that_fits_nowhere_is_refused(balls, refusal):
    cage = 3.5 * np.stack(np.meshgrid(*[np.arange(-12, 13)] * 3), axis=-1).reshape(-1, 3)
    cage = cage[(np.abs(cage).max(axis=1) < 30) & (np.linalg.norm(cage, axis=1) > 4)]
    count = len(cage)
    full = replace(
        balls,
        coordinates=np.concatenate([balls.coordinates, cage]),
        weights=np.concatenate([balls.weights, np.ones(count)]),
        chains=np.concatenate([balls.chains, np.full(count, "W")]),
        residues=np.concatenate([balls.residues, np.arange(count)]),
        representative=np.concatenate([balls.representative, np.ones(count, dtype=bool)]),
    )
    refusal(ConfigError, ["linker", "tries", "longer"], lambda: random_linkers(full, "L:208-408", "L:202-207", 1, 0))
