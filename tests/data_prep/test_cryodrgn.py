"""cryoDRGN's pickles and lists of stacks, against the STAR files that the pickles were made from."""

import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from data_prep.cryodrgn import with_cryodrgn_poses
from data_prep.sources import read_particles
from spire_dist.errors import SourceError

CRYODRGN = Path("particles/ml-struct-bio+cryodrgn/tests/data")
PFCRT = "metadata/ml-struct-bio+cryodrgn/tests/data/FinalRefinement-OriginalParticles-PfCRT.star"


def _pickled(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def _stack(path: Path, count: int, box: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.full((count, box, box), count, dtype=np.float32))
    return path


def _ctf(count: int, box: float = 12, pixel_size: float = 2.0) -> np.ndarray:
    """A CTF table of cryoDRGN, each row its own defocus."""
    table = np.tile([box, pixel_size, 0, 0, 30, 300, 2.7, 0.1, 5], (count, 1)).astype(np.float32)
    table[:, 2], table[:, 3] = 1e4 + np.arange(count), 9e3 + np.arange(count)
    return table


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_a_pose_pickle_gives_the_poses_of_the_star_file_it_was_made_from(shared_data):
    from_star = read_particles(shared_data / PFCRT, no_ctf=True)
    extent_a = np.full(5, 300 * 1.035)
    from_pickle = with_cryodrgn_poses(from_star, shared_data / CRYODRGN / "pose.star.pkl", extent_a)
    np.testing.assert_allclose(from_pickle.rotations, from_star.rotations, atol=1e-6)
    np.testing.assert_allclose(from_pickle.shifts_a, from_star.shifts_a, atol=1e-6)


def test_poses_in_two_files_or_without_shifts_are_read(shared_data, tmp_path):
    table = read_particles(shared_data / PFCRT, no_ctf=True)
    whole = shared_data / CRYODRGN / "pose.star.pkl"
    rotations, shifts = pickle.loads(whole.read_bytes())
    two = [_pickled(tmp_path / "rot.pkl", rotations), _pickled(tmp_path / "trans.pkl", shifts)]
    expected = with_cryodrgn_poses(table, whole, np.full(5, 10.0))
    for poses in ([whole], two):
        found = with_cryodrgn_poses(table, poses, np.full(5, 10.0))
        np.testing.assert_array_equal(found.rotations, expected.rotations)
        np.testing.assert_array_equal(found.shifts_a, expected.shifts_a)
    alone = with_cryodrgn_poses(table, two[0], np.full(5, 10.0))
    np.testing.assert_array_equal(alone.rotations, expected.rotations)
    np.testing.assert_array_equal(alone.shifts_a, np.zeros((5, 2)))


EYES = np.tile(np.eye(3), (5, 1, 1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((EYES[:4], np.zeros((4, 2))), ["rotations", "(4, 3, 3)", "(5, 3, 3)"]),
        ((EYES, np.zeros((5, 3))), ["shifts", "(5, 3)", "(5, 2)"]),
        (np.concatenate([EYES[:4], 2 * EYES[:1]]), ["row 5", "not a rotation"]),
        (np.concatenate([EYES[:4], -EYES[:1]]), ["row 5", "not a rotation"]),
        (np.concatenate([EYES[:4], 1e200 * EYES[:1]]), ["row 5", "not a rotation"]),
        ((EYES, np.full((5, 2), np.nan)), ["shift", "row 1 and 4 more"]),
        ((EYES, np.full((5, 2), 3.0)), ["row 1", "fractions of the box"]),
        (EYES.astype(object), ["object"]),
        (EYES.tolist(), ["5 entries"]),
        ({"rotations": EYES}, ["found dict"]),
    ],
)
def test_a_pose_pickle_that_does_not_fit_is_refused(shared_data, tmp_path, refusal, content, words):
    table = read_particles(shared_data / PFCRT, no_ctf=True)
    path = _pickled(tmp_path / "poses.pkl", content)
    refusal(SourceError, [str(path), *words], lambda: with_cryodrgn_poses(table, path, np.ones(5)))


def test_a_ctf_pickle_gives_what_the_star_file_lacks(shared_data):
    pickled = shared_data / CRYODRGN / "ctf1.pkl"  # made with the amplitude contrast given by hand
    table = read_particles(shared_data / PFCRT, ctf=pickled)
    expected = pickle.loads(pickled.read_bytes())
    np.testing.assert_array_equal(table.ctf[:, :7], expected[:, 2:])
    np.testing.assert_array_equal(table.ctf[:, 7:], np.tile([0.0, 1.0], (5, 1)))
    np.testing.assert_allclose(table.pixel_size_a, expected[:, 1], rtol=1e-6)  # the STAR file's own


# --- stacks ----------------------------------------------------------------------------------------------------------


def test_a_stack_with_a_ctf_pickle_is_the_star_file_of_the_same_images(shared_data):
    folder = shared_data / CRYODRGN
    from_star = read_particles(folder / "toy_projections.star", pixel_size=1.0)
    from_stack = read_particles(folder / "toy_projections.mrcs", ctf=folder / "test_ctf.pkl")
    np.testing.assert_allclose(from_stack.ctf, from_star.ctf, rtol=1e-6)
    for name in ("image_file", "slice_index", "pixel_size_a", "optics_group"):
        np.testing.assert_array_equal(getattr(from_stack, name), getattr(from_star, name))
    assert from_stack.image_paths == from_star.image_paths == ["toy_projections.mrcs"]
    assert from_stack.rotations is None


def test_a_list_is_its_stacks_one_after_the_other_relative_to_itself(tmp_path):
    _stack(tmp_path / "a" / "one.mrcs", 3)
    other = _stack(tmp_path / "elsewhere" / "two.MRC", 2)
    listed = tmp_path / "all.txt"
    listed.write_text(f"# extracted at 2 Å/px\na/one.mrcs\r\n\n  {other}  # moved\n")
    table = read_particles(listed, ctf=_pickled(tmp_path / "ctf.pkl", _ctf(5)))
    assert table.image_paths == ["a/one.mrcs", str(other)]
    np.testing.assert_array_equal(table.image_file, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(table.slice_index, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(table.ctf[:, 0], 1e4 + np.arange(5))


def test_the_ctf_tables_pixel_size_is_that_of_its_box(tmp_path):
    stack = _stack(tmp_path / "a.mrcs", 4, box=12)
    ctf = _pickled(tmp_path / "ctf.pkl", _ctf(4, box=36, pixel_size=1.5))
    np.testing.assert_allclose(read_particles(stack, ctf=ctf).pixel_size_a, 36 * 1.5 / 12)
    np.testing.assert_allclose(read_particles(stack, ctf=ctf, pixel_size=2.0).pixel_size_a, 2.0)
    np.testing.assert_allclose(read_particles(stack, no_ctf=True, pixel_size=3.0).pixel_size_a, 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["lists no stack"]),
        ("# nothing\n", ["lists no stack"]),
        ("a.mrcs\nrun_data.star\n", ["line 2", "'run_data.star'", ".mrcs"]),
        ("J7/particles.cs\n", ["line 1", "'J7/particles.cs'"]),
        ("a.mrcs\n\na.mrcs\n", ["lines 1 and 3", "same stack"]),
        ("absent.mrcs\n", ["absent.mrcs", "No such file"]),
        ("\0\1.mrcs\n", ["line 1", r"'\x00\x01.mrcs'"]),
    ],
)
def test_a_list_of_anything_but_stacks_is_refused_by_line(tmp_path, refusal, text, words):
    _stack(tmp_path / "a.mrcs", 2)
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    refusal(SourceError, words, lambda: read_particles(listed, no_ctf=True, pixel_size=1.0))


def test_a_list_that_is_no_text_is_refused(tmp_path, refusal):
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xff\xfe\x00")
    refusal(SourceError, [str(listed), "not a list of stacks"], lambda: read_particles(listed, no_ctf=True))


def test_a_stack_without_ctf_or_pixel_size_is_refused_with_what_to_give(tmp_path, refusal):
    stack = _stack(tmp_path / "a.mrcs", 2)
    refusal(SourceError, [str(stack), "ctf", "no_ctf"], lambda: read_particles(stack))
    refusal(SourceError, [str(stack), "pixel_size", "headers say 0"], lambda: read_particles(stack, no_ctf=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_ctf(3), ["(3, 9)", "(2, 9)"]),
        (_ctf(2)[:, :8], ["(2, 8)"]),
        (_ctf(2, box=0), ["a box of 0 px in row 1"]),
        (_ctf(2, pixel_size=1e9), ["pixel size 1e+09"]),
        (_ctf(2) * np.array([1] * 7 + [100, 1]), ["amplitude_contrast is 10 in row 1"]),
        (np.where(np.arange(9) == 4, np.nan, _ctf(2)), ["not a finite number in row 1 and 1 more"]),
        ([1, 2], ["found list"]),
    ],
)
def test_a_ctf_pickle_that_does_not_fit_is_refused(tmp_path, refusal, content, words):
    stack = _stack(tmp_path / "a.mrcs", 2)
    path = _pickled(tmp_path / "ctf.pkl", content)
    refusal(SourceError, words, lambda: read_particles(stack, ctf=path))
