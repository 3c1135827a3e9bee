"""States of a molecule: turned parts, missing blocks, mixtures."""

import numpy as np
import pytest

from spire_dist.errors import ConfigError
from spire_dist.simulation.molecules import axis_points, procedural_antibody, read_molecule, select
from spire_dist.simulation.states import assembly_states, mixture_states, turning_states

FAB, HINGE = "H:1-213,L", "H:213,H:244"


@pytest.fixture(scope="module")
def antibody(shared_data):
    return read_molecule([shared_data / "models/sarata00+SBI_Project/1hzh.pdb.gz"])


def test_turning_moves_the_part_rigidly_in_equal_steps_and_nothing_else(antibody):
    states = turning_states(antibody, FAB, axis_points(antibody, HINGE), 5)
    fab = select(antibody, FAB)
    assert np.ptp(states.coordinates[:, ~fab], axis=0).max() == 0
    assert states.present.all()
    np.testing.assert_array_equal(states.group, fab)
    hinge = antibody.representative & select(antibody, "H:213")
    assert np.ptp(states.coordinates[:, hinge], axis=0).max() < 1e-9
    some = np.flatnonzero(fab)[::100]
    inside = np.linalg.norm(states.coordinates[:, some, None] - states.coordinates[:, None, some], axis=-1)
    np.testing.assert_allclose(inside, np.broadcast_to(inside[0], inside.shape), atol=1e-9)
    steps = np.linalg.norm(np.roll(states.coordinates, -1, axis=0) - states.coordinates, axis=-1)[:, fab]
    np.testing.assert_allclose(
        steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9
    )  # the last one closes the circle
    deviation = states.coordinates[:, fab] - states.coordinates[:, fab].mean(axis=0)
    assert 20 < np.sqrt((deviation**2).sum(-1).mean()) < 30  # Å


def test_all_states_share_one_frame_whose_origin_is_the_mean_centre_of_mass(antibody):
    states = turning_states(antibody, FAB, axis_points(antibody, HINGE), 4)
    centre = (states.coordinates * antibody.weights[:, None]).sum((0, 1))
    np.testing.assert_allclose(centre / antibody.weights.sum(), 0, atol=1e-9)
    np.testing.assert_allclose(states.molecule.coordinates, states.coordinates[0], atol=1e-9)


def test_assembly_states_group_what_comes_and_goes_together(shared_data):
    blocks = sorted((shared_data / "models/lkinman+MAVEn/protocol_examples").glob("*.pdb.gz"))
    ribosome = read_molecule(blocks)
    assert len(set(ribosome.chains.tolist())) == 136  # as gemmi counts them, file by file: no two files share one
    five_s = ",".join(sorted({c for c in ribosome.chains.tolist() if c.startswith("RNA_5S")}))
    omit = ["", five_s, f"{five_s},prots1.A", "prots1.A,prots2.B"]
    states = assembly_states(ribosome, omit)
    mass = (states.present * ribosome.weights).sum(1)
    expected = [0, *(ribosome.weights[select(ribosome, o)].sum() for o in omit[1:])]
    np.testing.assert_allclose(mass, ribosome.weights.sum() - np.array(expected))
    assert states.group_names == ("fixed", "absent in 3", "absent in 2 3", "absent in 1 2")
    for chain, name in [("prots2.B", 1), ("prots1.A", 2), ("RNA_5S.A", 3), ("RNA1.A", 0)]:
        assert set(states.group[ribosome.chains == chain].tolist()) == {name}


def test_state_without_any_atoms_is_refused(antibody, refusal):
    refusal(ConfigError, ["omit", "state 1"], lambda: assembly_states(antibody, ["", "A,B,H,K,L,M"]))


def test_mixture_has_one_molecule_in_each_state_about_its_own_centre():
    complexes = [procedural_antibody(seed) for seed in range(3)]
    states = mixture_states(complexes, ["x", "y", "z"])
    assert states.group_names == ("fixed", "x", "y", "z")
    for state, one in enumerate(complexes):
        coordinates, weights = states.atoms(state)
        np.testing.assert_array_equal(weights, one.weights)
        np.testing.assert_allclose(weights @ coordinates, 0, atol=1e-6)
        np.testing.assert_allclose(np.diff(coordinates, axis=0), np.diff(one.coordinates, axis=0), atol=1e-9)
        assert set(states.group[states.present[state]].tolist()) == {state + 1}
    assert states.present.sum() == len(states.group)


def test_coordinates_that_all_states_share_are_in_memory_once():
    molecule = procedural_antibody(0)
    for states in (assembly_states(molecule, [""] * 50), mixture_states([molecule] * 50, ["m"] * 50)):
        assert states.coordinates.strides[0] == 0
        assert np.shares_memory(states.coordinates[0], states.coordinates[49])
