"""A subset keeps exactly the particles that it names, however it names them; read back with zarr alone."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile
import zarr

from data_prep.convert import prepare
from data_prep.edit import filter_store, merge
from data_prep.query import columns_of
from data_prep.subset import match_stacks
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError

CRYODRGN = "particles/ml-struct-bio+cryodrgn/tests/data"


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_particles) -> Path:
    return write_particles(tmp_path_factory.mktemp("in") / "project", count=150)


@pytest.fixture(scope="module")
def store(source) -> Path:
    labels = source.parent / "labels.npy"
    np.save(labels, np.arange(150) % 4)
    return prepare(source, source.parent.parent / "store", labels=labels, images_per_shard=64, workers=1)


def table(source: Path) -> Any:
    blocks: Any = starfile.read(source)
    return blocks["particles"]


def kept_rows(out: Path) -> list[int]:
    """Rows of the input, sorted."""
    return sorted(np.asarray(zarr.open_array(out / "source_index", mode="r")[:]).tolist())


def subset_star(source: Path, rows, path: Path, rename=lambda name: name) -> Path:
    blocks: Any = starfile.read(source)
    particles = blocks["particles"].iloc[list(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    starfile.write(blocks | {"particles": particles.assign(rlnImageName=particles["rlnImageName"].map(rename))}, path)
    return path


# --- STAR and .cs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("@", "@Extract/job007/"),
        lambda name: name.replace("@", "@/elsewhere/scratch/"),
        lambda name: name.replace("stacks/", "").replace(".mrcs", ".mrc"),
        lambda name: name.lstrip("0"),
    ],
    ids=["as written", "more folders", "absolute", "bare name of other ending", "unpadded"],
)
def test_a_star_subset_is_found_under_other_folders_too(store, source, tmp_path, rename):
    rows = [0, 59, 60, 77, 149]
    star = subset_star(source, rows, tmp_path / "Select/job1/particles.star", rename)
    said = filter_store(store, tmp_path / "out", star=star)
    assert said.startswith("5 of 150 particles kept")
    assert "by the end of the path" in said
    assert kept_rows(tmp_path / "out") == rows


def test_a_star_subset_in_its_project_is_not_guessed(store, source, tmp_path):
    star = subset_star(source, [3, 4], source.parent / "Select/job1/particles.star")
    assert "by the end" not in filter_store(store, tmp_path / "out", star=star)
    assert kept_rows(tmp_path / "out") == [3, 4]


def test_particles_that_the_store_lacks_are_counted_and_the_first_named(store, source, tmp_path):
    filter_store(store, tmp_path / "half", query="source_index < 75")
    star = subset_star(source, [10, 80, 90], tmp_path / "s.star")
    said = filter_store(tmp_path / "half", tmp_path / "out", star=star)
    assert "2 of its 3 rows not in the store, first row 2: 000021@stacks/part01.mrcs" in said
    assert kept_rows(tmp_path / "out") == [10]


def test_a_name_without_number_means_the_whole_stack(store, source, tmp_path):
    star = subset_star(source, [0], tmp_path / "s.star", lambda _: "stacks/part02.mrcs")
    filter_store(store, tmp_path / "out", star=star)
    assert kept_rows(tmp_path / "out") == list(range(120, 150))


def test_stacks_of_equal_names_are_told_apart_by_their_folders_or_refused(tmp_path):
    stacks = [Path("/a/lig1/x.mrcs"), Path("/a/lig2/x.mrcs"), Path("/a/lig2/y.mrcs")]
    star = tmp_path / "s.star"
    found, guessed = match_stacks(star, ["p/lig2/x.mrcs", "q/lig1/x.mrc", "z.mrcs", "/a/lig2/y.mrcs"], stacks)
    assert found.tolist() == [1, 0, -1, 2]
    assert sorted(guessed.tolist()) == [0, 1]
    found, _ = match_stacks(star, ["p/lig1/x.mrcs", "p/lig3/x.mrcs"], stacks[:1])
    assert found.tolist() == [0, -1]  # the first fits better
    with pytest.raises(SourceError, match=r"s\.star: x\.mrcs may be /a/lig1/x\.mrcs or /a/lig2/x\.mrcs"):
        match_stacks(star, ["x.mrcs"], stacks)
    with pytest.raises(SourceError, match=r"p/x\.mrcs and q/x\.mrcs both may be /a/lig1/x\.mrcs"):
        match_stacks(star, ["p/x.mrcs", "q/x.mrcs"], stacks[:1])


def test_cryosparcs_particles_are_found_by_uid_and_by_image(shared_data, tmp_path):
    cs, star = (shared_data / CRYODRGN / f"empiar_10076_7.{kind}" for kind in ("cs", "star"))
    options = {"box": 16, "allow_missing_poses": True, "sign": "-", "workers": 1}
    stores = [prepare(cs, tmp_path / "of_cs", **options), prepare(star, tmp_path / "of_star", **options)]
    rows = np.load(cs)
    chosen = [1, 4, 5]
    for name, columns in (("uid", ["uid", "blob/psize_A"]), ("image", ["blob/path", "blob/idx"])):
        part = np.zeros(3, dtype=[(column, rows.dtype[column]) for column in columns])
        for column in columns:
            part[column] = rows[column][chosen[::-1]]
        with open(tmp_path / f"{name}.cs", "wb") as file:
            np.save(file, part)
    for name, store in (("uid", stores[0]), ("image", stores[0]), ("image", stores[1])):
        out = tmp_path / f"{name}_{store.name}"
        filter_store(store, out, star=tmp_path / f"{name}.cs")
        assert kept_rows(out) == chosen
    with pytest.raises(SourceError, match=r"uid\.cs: no columns blob/path"):
        filter_store(stores[1], tmp_path / "none", star=tmp_path / "uid.cs")


def write_cs(path: Path, **columns) -> Path:
    """A .cs file of equally long columns; "__" in their names stands for "/"."""
    arrays = {name.replace("__", "/"): np.asarray(values) for name, values in columns.items()}
    rows = np.zeros(len(next(iter(arrays.values()))), dtype=[(name, array.dtype) for name, array in arrays.items()])
    for name, array in arrays.items():
        rows[name] = array
    with open(path, "wb") as file:
        np.save(file, rows)
    return path


def test_a_cs_file_may_name_its_stacks_in_either_kind_of_text(store, tmp_path):
    names = np.array([">stacks/part00.mrcs", "stacks/part01.mrcs"])
    for kind in ("U", "S"):
        cs = write_cs(tmp_path / f"{kind}.cs", blob__path=names.astype(kind), blob__idx=[3, 5])
        filter_store(store, tmp_path / kind, star=cs)
        assert kept_rows(tmp_path / kind) == [3, 65]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"blob__path": [1, 2], "blob__idx": [0, 1]}, ["blob/path", "int64"]),
        ({"blob__path": [b"a.mrc", b"b.mrc"], "blob__idx": [0.0, 1.5]}, ["blob/idx", "float64", "integers"]),
        ({"blob__path": [b"a.mrc", b"b.mrc"], "blob__idx": [0, -1]}, ["blob/idx", "-1", "row 2"]),
        ({"blob__path": [b"a.mrc", b"b.mrc"]}, ["no columns blob/path and blob/idx"]),
        ({"uid": ["a", "b"]}, ["uid", "<U1", "integers"]),
    ],
)
def test_columns_of_a_cs_file_that_mean_nothing_are_refused(store, tmp_path, refusal, columns, words):
    cs = write_cs(tmp_path / "s.cs", **columns)
    refusal(SourceError, ["s.cs", *words], lambda: filter_store(store, tmp_path / "out", star=cs))


# --- rows, labels, queries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "pkl", "txt"])
def test_rows_are_those_of_the_input_not_of_the_store(store, tmp_path, kind):
    rows, path = np.array([149, 2, 30, 2]), tmp_path / f"ind.{kind}"
    if kind == "npy":
        np.save(path, rows)
    else:
        path.write_bytes(pickle.dumps(rows)) if kind == "pkl" else np.savetxt(path, rows, fmt="%d")
    said = filter_store(store, tmp_path / "out", rows=path)
    assert said == f"3 of 150 particles kept: ind.{kind}"
    assert kept_rows(tmp_path / "out") == [2, 30, 149]


def test_labels_conditions_together_and_inverted(store, tmp_path):
    filter_store(store, tmp_path / "a", label=[1, 3])
    assert kept_rows(tmp_path / "a") == [row for row in range(150) if row % 4 in (1, 3)]
    filter_store(store, tmp_path / "b", label=[1], query="source_index >= 100", invert=True)
    assert kept_rows(tmp_path / "b") == [row for row in range(150) if not (row % 4 == 1 and row >= 100)]
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "a" / "label")[:]) % 2, 1)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("defocus_a < 15000", lambda t: (t["rlnDefocusU"] + t["rlnDefocusV"]) / 2 < 15000),
        ("defocus_u_a - defocus_v_a > 1e3", lambda t: t["rlnDefocusU"] - t["rlnDefocusV"] > 1e3),
        ("30 < tilt < 90 and not rot > 0", lambda t: (t["rlnAngleTilt"].between(30, 90)) & (t["rlnAngleRot"] <= 0)),
        (
            "shift_x * shift_x + shift_y * shift_y < 4",
            lambda t: t["rlnOriginXAngst"] ** 2 + t["rlnOriginYAngst"] ** 2 < 4,
        ),
        ("shift_x > 1", lambda t: t["rlnOriginXAngst"] < -1),  # the shift is minus the origin
        ("(stack_name == 'part01.mrcs') & (slice in [0, 3])", lambda t: t.index.isin([60, 63])),
        ("(stack == 2) | ~(source_index % 50 != 0)", lambda t: (t.index >= 120) | (t.index % 50 == 0)),
        ("-source_index // 50 == -3 or 1 / (slice + 1) == 1", lambda t: (t.index > 100) | (t.index % 60 == 0)),
        ("source_index * 100000000 > 14000000000", lambda t: t.index > 140),
        ("stack_name not in ('part00.mrcs', 'part02.mrcs')", lambda t: (t.index >= 60) & (t.index < 120)),
        ("optics_group_name == 'opticsGroup1' and label != 2", lambda t: t.index % 4 != 2),
    ],
)
def test_a_query_keeps_what_the_star_file_says(store, source, tmp_path, query, expected):
    rows = np.flatnonzero(expected(table(source)))
    assert 0 < len(rows) < 150
    filter_store(store, tmp_path / "out", query=query)
    assert kept_rows(tmp_path / "out") == rows.tolist()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("defocus < 3", ["no column defocus;", "defocus_a"]),
        ("uid == 3", ["no column uid;"]),  # a STAR file has none
        ("defocus_a.mean() < 3", ["Call"]),
        ("__import__('os').system('true')", ["no column __import__"]),
        ("label[0] == 3", ["Subscript"]),
        ("@label < 3", ["cannot be read"]),
        ("label <", ["cannot be read"]),
        ("label = 3", ["cannot be read"]),
        ("label", ["not true or false"]),
        ("label < 'a'", ["cannot be evaluated", "text"]),
        ("stack_name in [3]", ["cannot be evaluated", "text"]),
        ("slice in stack_name", ["not a list"]),
        ("label is 3", ["Is"]),
        ("1 < 2", ["not true or false"]),
        ("label == 3 & slice < 5", ["parentheses"]),
        ("slice < 9**9**9", ["Pow"]),
        ("stack_name == '%999999999999d' % 3", ["text can only be compared"]),
        ("stack_name == 'a' * 999999999999", ["text can only be compared"]),
        ("label < (lambda: 3)()", ["Call"]),
        ("-" * 5000 + "label < 3", ["cannot be"]),
        ("label < `3`", ["cannot be read"]),
        ("", ["cannot be read"]),
        ("label > 3", ["none of its 150 particles"]),
    ],
)
def test_a_query_that_cannot_be_is_refused_in_one_line(store, tmp_path, refusal, query, words):
    refusal(ConfigError, words, lambda: filter_store(store, tmp_path / "out", query=query))
    assert not (tmp_path / "out").exists()


def test_a_query_that_another_parser_reads_as_a_call_runs_nothing(store, tmp_path, refusal):
    """Text within quotes to Python, but not to a parser for which backticks quote names first."""
    touched = tmp_path / "touched"
    query = r"""slice in ["\\\\", "`", '` " , @os.mkdir("TOUCHED") , " ', 1] # " ]""".replace("TOUCHED", str(touched))
    refusal(ConfigError, ["query", "text"], lambda: filter_store(store, tmp_path / "out", query=query))
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_wrong_subsets_are_refused_by_name(store, source, tmp_path, refusal):
    out = tmp_path / "out"

    def refused(kind, words, **conditions):
        refusal(kind, words, lambda: filter_store(store, out, **conditions))
        assert not out.exists()

    refused(ConfigError, ["no condition"])
    refused(ConfigError, ["label", "7", "0, 1, 2, 3"], label=[1, 7])
    refused(SourceError, ["none.star"], star=tmp_path / "none.star")
    refused(SourceError, ["labels.npy", ".star"], star=source.parent / "labels.npy")
    refused(SourceError, ["none.npy"], rows=tmp_path / "none.npy")
    np.save(tmp_path / "floats.npy", np.array([1.5]))
    refused(SourceError, ["floats.npy", "float64"], rows=tmp_path / "floats.npy")
    (tmp_path / "prose.txt").write_text("no rows\n")
    refused(SourceError, ["prose.txt"], rows=tmp_path / "prose.txt")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(SourceError, ["evil.pkl", "system"], rows=tmp_path / "evil.pkl")
    np.save(tmp_path / "far.npy", np.array([150, 151]))
    refused(ConfigError, ["far.npy", "2 of its 2 rows not in the store", "row 150"], rows=tmp_path / "far.npy")
    star = subset_star(source, [0, 1], tmp_path / "wrong.star", lambda _: "x@stacks/part00.mrcs")
    refused(SourceError, ["wrong.star", "row 1", "x@stacks"], star=star)


def test_rows_of_a_merged_store_are_refused_for_they_have_no_one_file(
    store, source, tmp_path, refusal, write_particles
):
    other = write_particles(tmp_path / "other", count=70, seed=1)
    more = prepare(other, tmp_path / "more", images_per_shard=64, workers=1)
    merge([store, more], tmp_path / "both")
    np.save(tmp_path / "rows.npy", np.arange(3))
    refusal(
        ConfigError,
        ["rows.npy", "2"],
        lambda: filter_store(tmp_path / "both", tmp_path / "out", rows=tmp_path / "rows.npy"),
    )
    filter_store(tmp_path / "both", tmp_path / "out", star=other)  # its stacks have the names of the first store's
    assert kept_rows(tmp_path / "out") == list(range(70))
    assert ParticleStore.open(tmp_path / "out").sources == [other]


def test_every_column_of_a_query_has_a_value_for_each_particle(store):
    columns = columns_of(ParticleStore.open(store))
    assert {"defocus_a", "rot", "tilt", "psi", "shift_x", "source", "stack", "label", "voltage_kv"} <= set(columns)
    assert all(len(values()) == 150 for values in columns.values())


def test_a_subset_of_a_moved_project_is_found(source, tmp_path):
    moved = Path(shutil.copytree(source.parent, tmp_path / "moved")) / source.name
    store = prepare(moved, tmp_path / "store", workers=1)
    star = subset_star(source, [5, 6], source.parent / "few.star")
    assert "by the end of the path" in filter_store(store, tmp_path / "out", star=star)
    assert kept_rows(tmp_path / "out") == [5, 6]
