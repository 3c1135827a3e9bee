"""cryoSPARC tables against what cryoDRGN made of the same files, joined files against whole ones, and refusals."""

import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_prep.sources import read_particles
from data_prep.table import ParticleTable
from spire_dist.errors import SourceError

FOLDER = Path("metadata/ml-struct-bio+cryodrgn/tests/data")
REFINEMENT = FOLDER / "cryosparc_P12_J24_001_particles.cs"


@pytest.fixture
def rows(shared_data: Path) -> np.ndarray:
    """2,019 particles of a real refinement."""
    return np.load(shared_data / REFINEMENT)


def _saved(path: Path, rows: np.ndarray) -> Path:
    with open(path, "wb") as file:
        np.save(file, rows)
    return path


def _columns(rows: np.ndarray, names: Iterable[str], more: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """A table with the columns `names` of `rows`, and `more` [N, ...]."""
    columns = {name: rows[name] for name in names} | (more or {})
    table = np.empty(len(rows), dtype=[(name, c.dtype, c.shape[1:]) for name, c in columns.items()])
    for name, column in columns.items():
        table[name] = column
    return table


def _names(rows: np.ndarray, *prefixes: str) -> list[str]:
    return [name for name in rows.dtype.names or () if name.startswith(prefixes)]


def _assert_same(one: ParticleTable, other: ParticleTable) -> None:
    for name in ("rotations", "shifts_a", "ctf", "pixel_size_a", "stated_box", "slice_index", "uid", "optics_group"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert [one.image_paths[f] for f in one.image_file] == [other.image_paths[f] for f in other.image_file]


# --- one file --------------------------------------------------------------------------------------------------------


def test_poses_equal_cryodrgns_also_for_rotation_vectors_beyond_pi(shared_data, rows):
    table = read_particles(shared_data / REFINEMENT)
    rotations, centring = pickle.loads((shared_data / FOLDER / "pose.cs.pkl").read_bytes())
    assert np.linalg.norm(rows["alignments3D/pose"], axis=1).max() > np.pi
    np.testing.assert_allclose(table.rotations, rotations, atol=1e-6)
    np.testing.assert_allclose(table.shifts_a, -centring * 180 * 2.95, atol=1e-4)
    np.testing.assert_array_equal(table.uid, rows["uid"])


def test_ctf_equals_cryodrgns(shared_data):
    table = read_particles(shared_data / REFINEMENT)
    expected = pickle.loads((shared_data / FOLDER / "ctf2.pkl").read_bytes())  # box, Å/px, then our first seven columns
    np.testing.assert_allclose(table.ctf[:, :7], expected[:, 2:], rtol=1e-6)
    np.testing.assert_array_equal(table.ctf[:, 7:], np.tile([0.0, 1.0], (2019, 1)))
    np.testing.assert_allclose(table.pixel_size_a, expected[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(table.stated_box, expected[:, 0])


def test_a_zero_rotation_vector_is_no_turn(tmp_path, rows):
    rows["alignments3D/pose"][7] = 0
    table = read_particles(_saved(tmp_path / "a.cs", rows))
    assert table.rotations is not None
    np.testing.assert_array_equal(table.rotations[7], np.eye(3))


def test_a_leading_arrow_in_a_path_is_removed_and_a_2d_alignment_is_no_pose(shared_data):
    table = read_particles(shared_data / FOLDER / "cryosparc_J2_particles_exported.cs")
    assert table.image_paths == ["J1/imported/000090334788266266069_18jam15b_0345_ali_DW.mrcs"]
    assert table.rotations is None
    assert table.missing_poses == "aligned in 2-D only: alignments2D is no 3-D pose"


def test_shifts_are_in_pixels_of_the_alignment_not_of_the_images(shared_data, tmp_path, rows):
    rows["alignments3D/psize_A"] *= 2
    one, other = read_particles(shared_data / REFINEMENT), read_particles(_saved(tmp_path / "binned.cs", rows))
    np.testing.assert_allclose(other.shifts_a, 2 * one.shifts_a, rtol=1e-6)
    np.testing.assert_array_equal(one.pixel_size_a, other.pixel_size_a)


# --- classes ---------------------------------------------------------------------------------------------------------


def _with_classes(rows: np.ndarray, older: bool, pixel_size_per_class: bool) -> np.ndarray:
    """The table as a classification writes it: each particle's own pose in its most probable of four classes."""
    rng, count, classes = np.random.default_rng(0), len(rows), 4
    best, every = rng.integers(0, classes, count), np.arange(count)
    posterior = rng.uniform(0, 0.2, (count, classes)).astype(np.float32)
    posterior[every, best] = 0.9
    pose = Rotation.random(count * classes, rng=rng).as_rotvec().reshape(count, classes, 3).astype(np.float32)
    shift = rng.normal(0, 5, (count, classes, 2)).astype(np.float32)
    unit_a = rng.uniform(1, 9, (count, classes)).astype(np.float32)
    pose[every, best], shift[every, best] = rows["alignments3D/pose"], rows["alignments3D/shift"]
    unit_a[every, best] = rows["alignments3D/psize_A"]
    fields = {"pose": pose, "shift": shift, "psize_A": unit_a, "class_posterior": posterior}
    if older:
        more = {f"alignments_class_{k}/{name}": c[:, k] for k in range(classes) for name, c in fields.items()}
    else:
        if not pixel_size_per_class:
            fields["psize_A"] = rows["alignments3D/psize_A"]
        more = {f"alignments3D_multi/{name}": column for name, column in fields.items()}
    return _columns(rows, ["uid", *_names(rows, "blob/", "ctf/")], more)


@pytest.mark.parametrize(("older", "pixel_size_per_class"), [(True, True), (False, True), (False, False)])
def test_the_pose_of_the_most_probable_class_is_taken(shared_data, tmp_path, rows, older, pixel_size_per_class):
    path = _saved(tmp_path / "classes.cs", _with_classes(rows, older, pixel_size_per_class))
    _assert_same(read_particles(path), read_particles(shared_data / REFINEMENT))


def test_the_pose_common_to_all_classes_wins_over_that_of_a_class(shared_data, tmp_path, rows):
    classes = _with_classes(rows[::-1], older=False, pixel_size_per_class=True)
    both = _columns(rows, rows.dtype.names, {name: classes[name] for name in _names(classes, "alignments3D_multi/")})
    _assert_same(read_particles(_saved(tmp_path / "both.cs", both)), read_particles(shared_data / REFINEMENT))


@pytest.mark.parametrize("older", [True, False])
def test_a_class_without_its_posterior_is_refused(tmp_path, rows, refusal, older):
    table = _with_classes(rows, older, pixel_size_per_class=True)
    path = _saved(tmp_path / "a.cs", _columns(table, [n for n in table.dtype.names if "posterior" not in n]))
    refusal(SourceError, [str(path), "class_posterior", "missing"], lambda: read_particles(path))


def test_a_table_of_thirty_older_classes_is_read(tmp_path, rows):
    fields = [name.partition("/")[2] for name in _names(rows, "alignments3D/")]
    more = {f"alignments_class_{k}/{field}": rows[f"alignments3D/{field}"] for k in range(30) for field in fields}
    path = _saved(tmp_path / "a.cs", _columns(rows, ["uid", *_names(rows, "blob/", "ctf/")], more))
    with pytest.raises(ValueError, match="Header info length"):  # why our limit is not numpy's
        np.load(path)
    assert len(read_particles(path)) == len(rows)


# --- passthrough files and result groups -----------------------------------------------------------------------------


def test_passthrough_files_are_joined_by_uid_not_by_order(shared_data, tmp_path, rows):
    order = np.random.default_rng(1).permutation(len(rows))
    main = _saved(tmp_path / "main.cs", _columns(rows, ["uid", *_names(rows, "alignments3D/")]))
    blob = _saved(tmp_path / "blob.cs", _columns(rows[order], ["uid", *_names(rows, "blob/")]))
    ctf = _saved(tmp_path / "ctf.cs", _columns(rows[::-1], ["uid", *_names(rows, "ctf/")]))
    table = read_particles(main, passthrough=[blob, ctf])
    _assert_same(table, read_particles(shared_data / REFINEMENT))
    assert table.also_read == [blob, ctf]


def test_a_passthrough_file_with_more_particles_serves_and_its_older_columns_do_not_count(tmp_path, rows):
    older = rows.copy()
    older["alignments3D/pose"] = older["alignments3D/pose"][::-1]
    few = _saved(tmp_path / "few.cs", _columns(rows[100:200], ["uid", *_names(rows, "blob/", "alignments3D/")]))
    table = read_particles(few, passthrough=[_saved(tmp_path / "all.cs", older)])
    whole = read_particles(_saved(tmp_path / "whole.cs", rows[100:200]))
    _assert_same(table, whole)


def test_particles_missing_from_a_passthrough_file_are_counted_and_the_first_is_named(tmp_path, rows, refusal):
    main = _saved(tmp_path / "main.cs", _columns(rows, ["uid", *_names(rows, "blob/")]))
    path = _saved(tmp_path / "pass.cs", np.concatenate([rows[:40], rows[43:]]))
    words = [str(path), "lacks 3 of the 2019", "row 41", str(rows["uid"][40])]
    refusal(SourceError, words, lambda: read_particles(main, passthrough=[path]))


def test_a_passthrough_file_without_or_with_repeated_uids_is_refused(tmp_path, rows, refusal):
    main = _saved(tmp_path / "main.cs", _columns(rows, ["uid", *_names(rows, "blob/")]))
    without = _saved(tmp_path / "without.cs", _columns(rows, _names(rows, "ctf/")))
    refusal(SourceError, [str(without), "uid is missing"], lambda: read_particles(main, passthrough=[without]))
    rows["uid"][9] = rows["uid"][4]
    twice = _saved(tmp_path / "twice.cs", rows)
    refusal(SourceError, [str(twice), "rows 5 and 10"], lambda: read_particles(main, passthrough=[twice]))


GROUP = """\
created: 2024-03-27 18:39:45.234567
group:
  description: All particles, including alignments
  name: particles
  title: All particles
  type: particle
results:
  alignments3D:
    metafile: '>new.cs'
    num_items: 2019
    type: particle.alignments3D
  blob:
    metafile: '>old.cs'
    num_items: 2019
    type: particle.blob
  ctf:
    metafile: '>new.cs'
    num_items: 2019
    type: particle.ctf
  location:
    metafile: '>not_here.cs'
    num_items: 2019
    type: particle.location
version: v4.4.1
"""


def test_a_result_group_takes_each_slot_from_the_file_it_names(shared_data, tmp_path, rows):
    stale = rows.copy()
    stale["alignments3D/pose"], stale["ctf/df1_A"] = 1.0, 1e4
    group = tmp_path / "particles.csg"
    group.write_text(GROUP)
    old, new = _saved(tmp_path / "old.cs", stale), _saved(tmp_path / "new.cs", rows[::-1])
    table = read_particles(group)
    _assert_same(table, read_particles(shared_data / REFINEMENT))
    assert table.also_read == [old, new]
    missing = new.rename(tmp_path / "elsewhere.cs")
    with pytest.raises(SourceError, match=r"new\.cs"):
        read_particles(group)
    assert missing.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GROUP.replace("type: particle\n", "type: volume\n"), ["'volume'", "particles is needed"]),
        (GROUP.replace("  blob:", "  template:"), ["names no images", "alignments3D, ctf"]),
        ("", ["not a cryoSPARC result group"]),
        ("results: [1, 2]", ["not a cryoSPARC result group"]),
        ("a: b: c", ["not a cryoSPARC result group"]),
        ("results: !!python/object/apply:os.mkdir [ran]", ["not a cryoSPARC result group"]),
        ("[" * 5000, ["not a cryoSPARC result group"]),
    ],
)
def test_a_file_that_is_no_result_group_of_particles_is_refused(tmp_path, monkeypatch, refusal, text, words):
    monkeypatch.chdir(tmp_path)
    group = tmp_path / "a.csg"
    group.write_text(text)
    refusal(SourceError, [str(group), *words], lambda: read_particles(group))
    assert os.listdir(tmp_path) == ["a.csg"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["blob/path", "blob/idx", "blob/psize_A", "ctf/df1_A", "ctf/amp_contrast", "alignments3D/psize_A"]
)
def test_a_file_that_lacks_a_column_is_refused_by_its_name(tmp_path, rows, refusal, column):
    path = _saved(tmp_path / "lacking.cs", _columns(rows, [name for name in rows.dtype.names if name != column]))
    refusal(SourceError, [str(path), column, "missing"], lambda: read_particles(path))


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("alignments3D/pose", np.full(3, np.nan), ["not a finite number"]),
        ("alignments3D/pose", np.full(3, 1e30), ["radians"]),
        ("alignments3D/psize_A", 0.0, ["expected 0.05 to 100"]),
        ("alignments3D/shift", np.array([3e5, 0]), ["a shift of 885000 Å"]),
        ("blob/psize_A", 1e-10, ["pixel size 1e-10"]),
        ("blob/path", b"", ["''"]),
        ("blob/path", b"J1/a\nb.mrc", [r"'J1/a\nb.mrc'"]),
        ("blob/shape", np.array([180, 178]), ["180 × 178 px"]),
        ("ctf/amp_contrast", 7.0, ["amplitude_contrast is 7"]),
        ("ctf/accel_kv", np.inf, ["not a finite number"]),
        ("ctf/scale", 1e30, ["scale is 1e+30"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_column_and_row(tmp_path, rows, refusal, column, values, words):
    rows[column][41] = values
    path = _saved(tmp_path / "a.cs", rows)
    column_or_name = [] if column.startswith(("ctf/", "alignments3D/shift", "blob/psize_A")) else [column]
    refusal(SourceError, [str(path), "row 42", *column_or_name, *words], lambda: read_particles(path))


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("ctf/df1_A", np.full(2019, b"far"), ["|S3", "expected numbers"]),
        ("blob/idx", np.zeros(2019), ["float64", "expected integers"]),
        ("blob/path", np.zeros(2019), ["names of stacks"]),
        ("alignments3D/pose", np.zeros((2019, 2)), ["(2,)", "(3,)"]),
        ("blob/shape", np.zeros(2019, dtype=np.int32), ["integers of shape (2,)"]),
        ("blob/idx", np.full(2019, -1), ["-1 in row 1"]),
        ("uid", np.zeros((2019, 2), dtype=np.uint64), ["uid"]),
    ],
)
def test_a_column_of_another_type_is_refused_by_name(tmp_path, rows, refusal, column, values, words):
    path = _saved(tmp_path / "a.cs", _columns(rows, [n for n in rows.dtype.names if n != column], {column: values}))
    refusal(SourceError, [str(path), column, *words], lambda: read_particles(path))


class _RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_python_objects_in_a_table_are_refused_and_not_unpickled(tmp_path, rows, refusal):
    path, trace = tmp_path / "a.cs", tmp_path / "it_ran"
    objects = np.empty(2, dtype=[("uid", "u8"), ("blob/path", "O")])
    objects["blob/path"] = _RunsCode(trace)
    with open(path, "wb") as file:
        np.save(file, objects, allow_pickle=True)
    refusal(SourceError, [str(path), "Python objects"], lambda: read_particles(path))
    assert not trace.exists()


def test_a_header_of_rows_without_bytes_is_refused(tmp_path, refusal):
    path = _saved(tmp_path / "a.cs", np.zeros(7, dtype=[("uid", "V0"), ("blob/path", "V0")]))
    path.write_bytes(path.read_bytes().replace(b"(7,), }         ", b"(9999999999,), }"))
    refusal(SourceError, [str(path), "not a cryoSPARC table"], lambda: read_particles(path))


def test_a_file_shorter_than_its_header_says_is_refused_with_what_it_holds(tmp_path, rows, refusal):
    path = _saved(tmp_path / "a.cs", rows)
    content = path.read_bytes()
    path.write_bytes(content[: -3 * rows.itemsize + 1])
    refusal(SourceError, [str(path), "truncated", "2016 of the 2019"], lambda: read_particles(path))
    path.write_bytes(content.replace(b"(2019,)", b"(9999999999,)", 1))
    refusal(SourceError, [str(path), "truncated", "of the 9999999999"], lambda: read_particles(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no numpy array"]),
        (b"uid,path\n1,2\n", ["no numpy array"]),
        (b"\x94CSDAT and the rest", ["stream format", "cryosparc-tools"]),
        (b"\x93NUMPY", ["header is damaged"]),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, refusal, content, words):
    path = tmp_path / "a.cs"
    path.write_bytes(content)
    refusal(SourceError, [str(path), *words], lambda: read_particles(path))


@pytest.mark.parametrize(
    "rows", [np.zeros(5), np.zeros((2, 2), dtype=[("uid", "u8")]), np.zeros(0, dtype=[("uid", "u8")])]
)
def test_an_array_without_rows_or_columns_is_refused(tmp_path, refusal, rows):
    path = _saved(tmp_path / "a.cs", rows)
    refusal(SourceError, [str(path)], lambda: read_particles(path))
