"""Stores made of stores hold the same bytes in the right rows, whatever interrupts them; read back with zarr alone."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import copying, edit
from data_prep.checks import inspect_store, verify_store
from data_prep.convert import prepare
from data_prep.edit import add, filter_store, merge
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError, StoreError

SMALL: dict[str, Any] = {"images_per_shard": 64, "workers": 1}


def arrays(store: Path) -> dict[str, np.ndarray]:
    """All arrays of a store by name, as zarr reads them."""
    names = [path.parent.name for path in store.glob("*/zarr.json")]
    return {name: np.asarray(zarr.open_array(store / name, mode="r")[:]) for name in names}


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pixels(of: dict[str, np.ndarray]) -> np.ndarray:
    return of["images"].astype(np.float32) * of["scale"][:, None, None] if "scale" in of else of["images"]


def attributes(store: Path) -> dict[str, Any]:
    return json.loads((store / "zarr.json").read_text())["attributes"]


@pytest.fixture(scope="module", params=["float16", "compact"])
def stores(request, tmp_path_factory, write_particles) -> tuple[Path, Path]:
    """Of 200 particles bright in their files, and of 150 dark ones; shards of 64."""
    folder = tmp_path_factory.mktemp("stores")
    sources = [
        write_particles(folder / "in" / name, count=count, contrast=contrast, seed=count)
        for name, count, contrast in (("bright", 200, 3.0), ("dark", 150, -3.0))
    ]
    one, other = (prepare(s, folder / s.parent.name, dtype=request.param, **SMALL) for s in sources)
    return one, other


@pytest.fixture(scope="module")
def merged(stores) -> Path:
    out = stores[0].parent / "merged"
    merge(stores, out)
    return out


# --- merge -----------------------------------------------------------------------------------------------------------


def test_a_merged_store_holds_full_shards_first_and_then_the_short_ones(stores, merged):
    one, other, both = (arrays(store) for store in (*stores, merged))
    for name in set(one) - {"source", "stack", "optics_group"}:
        expected = np.concatenate([one[name][:192], other[name][:128], one[name][192:], other[name][128:]])
        np.testing.assert_array_equal(both[name], expected, err_msg=name)
    np.testing.assert_array_equal(both["source"], np.repeat([0, 1, 0, 1], [192, 128, 8, 22]))
    assert verify_store(merged) == []


def test_full_shards_are_one_file_with_two_names(stores, merged):
    for shard, (store, old) in enumerate(
        [(stores[0], 0), (stores[0], 1), (stores[0], 2), (stores[1], 0), (stores[1], 1)]
    ):
        theirs, ours = store / f"images/c/{old}/0/0", merged / f"images/c/{shard}/0/0"
        assert ours.samefile(theirs)
        assert ours.stat().st_nlink >= 2
    assert (merged / "images/c/5/0/0").stat().st_nlink == 1


def test_the_way_back_to_file_stack_and_slice_is_kept(stores, merged):
    both, described = arrays(merged), json.loads((merged / "stacks.json").read_text())
    sources = [entry["path"] for entry in attributes(merged)["inputs"] if entry["role"] == "particles"]
    for row in (0, 100, 191, 192, 310, 321, 349):
        source = Path(sources[both["source"][row]])
        tables: Any = starfile.read(source)
        name = tables["particles"]["rlnImageName"][both["source_index"][row]]
        number, stack = name.split("@")
        assert Path(described[both["stack"][row]]["path"]) == source.parent / stack
        assert both["slice"][row] == int(number) - 1


def test_each_source_keeps_how_its_images_were_made(merged):
    assert [recipe["sign"]["applied"] for recipe in attributes(merged)["recipes"]] == [1, -1]
    text = inspect_store(merged)
    for words in (
        "kept as it was",
        "inverted",
        "200 particles",
        "150 particles",
        "200 particles of bright merged with 150 particles of dark",
    ):
        assert words in text


def test_links_that_the_disk_refuses_become_copies(stores, tmp_path, monkeypatch, merged):
    link = os.link

    def refuse(old: Path, new: Path, **options: Any) -> None:
        if "images" in Path(old).parts:  # zarr links its own files
            raise OSError("Invalid cross-device link")
        link(old, new, **options)

    monkeypatch.setattr(os, "link", refuse)
    merge(stores, tmp_path / "copied")
    assert (tmp_path / "copied/images/c/0/0/0").stat().st_nlink == 1
    assert contents(tmp_path / "copied") == contents(merged)


def test_a_merge_of_parts_knows_again_what_they_share(stores, tmp_path):
    filter_store(stores[0], tmp_path / "near", query="defocus_a < 15000")
    filter_store(stores[0], tmp_path / "far", query="defocus_a >= 15000")
    merge([tmp_path / "near", tmp_path / "far"], tmp_path / "again")
    whole, again = attributes(stores[0]), attributes(tmp_path / "again")
    assert again["inputs"] == whole["inputs"]
    assert again["optics_groups"] == whole["optics_groups"]
    near, far, together = (entry["did"] for entry in again["history"])
    assert "kept: defocus_a < 15000" in near
    assert "kept: defocus_a >= 15000" in far
    assert "merged with" in together
    assert verify_store(tmp_path / "again") == []


def test_an_image_in_both_stores_is_refused_by_name_unless_allowed(stores, tmp_path, refusal):
    query = "source_index in [3, 4, 5]"
    filter_store(stores[0], tmp_path / "some", query=query)
    pair, out = [stores[0], tmp_path / "some"], tmp_path / "out"
    words = [str(tmp_path / "some"), "3 of its particles", str(stores[0]), "part00.mrcs"]
    refusal(StoreError, words, lambda: merge(pair, out))
    refusal(StoreError, ["200 of its particles"], lambda: merge([stores[0], stores[0]], out))
    assert not out.exists()
    merge(pair, out, allow_duplicates=True)
    assert len(ParticleStore.open(out)) == 203
    assert verify_store(out) == []


def test_rows_of_a_file_that_was_copied_elsewhere_are_known_again(stores, tmp_path, refusal):
    source = Path(attributes(stores[0])["inputs"][0]["path"])
    shutil.copytree(source.parent, tmp_path / "copy")
    dtype = attributes(stores[0])["options"]["dtype"]
    other = prepare(tmp_path / "copy" / source.name, tmp_path / "other", dtype=dtype, **SMALL)
    refusal(StoreError, ["200 of its particles", str(stores[0])], lambda: merge([stores[0], other], tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box": 12}, ["box is 12", "16"]),
        ({"pixel_size": 2.01}, ["2.01 Å/px", "at 2 Å/px"]),
        ({"dtype": "float32"}, ["dtype is float32"]),
        ({"images_per_shard": 128}, ["images_per_shard is 128", "64"]),
        ({"normalise": False}, ["normalised is False", "True"]),
        ({"no_ctf": True}, ["has_ctf is False", "True"]),
    ],
)
def test_stores_that_do_not_fit_are_refused_by_name_and_value(stores, tmp_path, refusal, change, words):
    source = Path(attributes(stores[1])["inputs"][0]["path"])
    options = {"dtype": attributes(stores[0])["options"]["dtype"], **SMALL, **change}
    other = prepare(source, tmp_path / "other", **options)
    words = [str(tmp_path / "other"), str(stores[0]), *words]
    refusal(StoreError, words, lambda: merge([stores[0], other], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_pixel_sizes_of_the_same_extent_are_merged(stores, tmp_path):
    source = Path(attributes(stores[1])["inputs"][0]["path"])
    dtype = attributes(stores[0])["options"]["dtype"]
    other = prepare(source, tmp_path / "other", dtype=dtype, pixel_size=2.0001, **SMALL)
    merge([stores[0], other], tmp_path / "out")
    assert verify_store(tmp_path / "out") == []


def test_one_store_is_no_merge(stores, tmp_path, refusal):
    refusal(ConfigError, ["1 store"], lambda: merge(stores[:1], tmp_path / "out"))


def test_labels_stay_only_where_every_store_has_them(stores, tmp_path):
    source = Path(attributes(stores[1])["inputs"][0]["path"])
    np.save(tmp_path / "labels.npy", np.arange(150) % 3)
    dtype = attributes(stores[0])["options"]["dtype"]
    labelled = prepare(source, tmp_path / "labelled", labels=tmp_path / "labels.npy", dtype=dtype, **SMALL)
    assert "without label" in merge([stores[0], labelled], tmp_path / "out")
    assert ParticleStore.open(tmp_path / "out").label is None


# --- complete or absent ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from data_prep.edit import filter_store, merge
left = int(sys.argv[1])
def counted(call):
    def counting(*arguments, **options):
        global left
        left -= sys._getframe(1).f_globals["__name__"].startswith(("spire_dist", "data_prep"))  # zarr names files too
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counting
os.replace, os.link = counted(os.replace), counted(os.link)
exec(sys.argv[2])
"""
"""Runs a statement, and kills itself before the n-th time that a file gets its name."""


@pytest.mark.parametrize("verb", ["merge", "filter"])
def test_a_killed_edit_goes_on_and_ends_in_the_same_bytes(stores, tmp_path, merged, verb):
    one, other = stores
    out, expected = tmp_path / "out", merged
    if verb == "merge":
        statement = f"merge([Path({str(one)!r}), Path({str(other)!r})], Path({str(out)!r}))"
    else:
        expected = tmp_path / "whole"
        filter_store(one, expected, query="tilt < 120")
        statement = f"filter_store(Path({str(one)!r}), Path({str(out)!r}), query='tilt < 120')"
    moments = (2, 3, 6) if verb == "merge" else (3,)  # the tables, a link and its note, a later one
    for moment in moments:
        process = subprocess.run([sys.executable, "-c", KILLED, str(moment), statement], check=False)
        assert process.returncode == -signal.SIGKILL, moment
        assert not (out / "manifest.json").exists()
    process = subprocess.run([sys.executable, "-c", KILLED, "0", statement], check=False)
    assert process.returncode == 0
    assert contents(out) == contents(expected)
    assert not list(tmp_path.glob(".*"))
    assert verify_store(out) == []


def test_a_finished_edit_is_left_alone_and_another_one_refused(stores, tmp_path, refusal):
    out = tmp_path / "out"
    said = filter_store(stores[0], out, query="tilt < 90")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert filter_store(stores[0], out, query="tilt < 90") == said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    refusal(StoreError, [str(out), "another name"], lambda: filter_store(stores[0], out, query="tilt < 91"))
    refusal(StoreError, [str(out), "another name"], lambda: merge(stores, out))
    refusal(StoreError, [str(stores[1]), "another name"], lambda: merge(stores, stores[1]))
    source = Path(attributes(stores[0])["inputs"][0]["path"])
    refusal(StoreError, [str(out), "another name"], lambda: prepare(source, out, **SMALL))
    (tmp_path / "file").write_text("")
    refusal(ConfigError, ["file"], lambda: merge(stores, tmp_path / "file"))


def test_a_rows_file_that_changed_meanwhile_is_not_taken_for_the_same(stores, tmp_path, refusal):
    rows, out = tmp_path / "rows.npy", tmp_path / "out"
    np.save(rows, np.arange(50))
    filter_store(stores[0], out, rows=rows)
    np.save(rows, np.arange(50) + 1)
    refusal(StoreError, [str(out)], lambda: filter_store(stores[0], out, rows=rows))


def test_a_shard_that_is_gone_is_named_and_nothing_is_finished(stores, tmp_path, refusal):
    store = Path(shutil.copytree(stores[0], tmp_path / "store"))
    (store / "images/c/1/0/0").unlink()
    out = tmp_path / "out"
    refusal(StoreError, [str(store / "images/c/1/0/0"), "verify"], lambda: merge([store, stores[1]], out))
    assert not (out / "manifest.json").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(stores, tmp_path, refusal, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda _: usage._replace(free=100))
    out = tmp_path / "out"
    refusal(ConfigError, [str(out), "free"], lambda: filter_store(stores[0], out, query="tilt < 90"))
    assert not out.exists()


# --- any rows --------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.lists(st.integers(-1, 2), min_size=200, max_size=200), skewed=st.booleans())
def test_any_parts_of_a_store_hold_its_images_and_any_merge_of_them_too(stores, tmp_path_factory, part, skewed):
    folder, whole = tmp_path_factory.mktemp("parts"), arrays(stores[0])
    parts = np.array(part)
    if skewed:  # runs of 64 and more, so that whole shards and chunks are kept
        parts[whole["source_index"].argsort()[:150]] = 0
    parts_of_row = parts[whole["source_index"]]
    made = []
    for number in np.unique(parts[parts >= 0]):
        np.savetxt(folder / "rows.txt", np.flatnonzero(parts == number), fmt="%d")
        out = folder / str(number)
        filter_store(stores[0], out, rows=folder / "rows.txt")
        found = arrays(out)
        for name in set(whole) - {"stack"}:
            np.testing.assert_array_equal(found[name], whole[name][parts_of_row == number], err_msg=name)
        made.append(out)
    if len(made) > 1:
        merge(made, folder / "merged")
        found = arrays(folder / "merged")
        rows = {index: row for row, index in enumerate(whole["source_index"].tolist())}
        old = np.array([rows[index] for index in found["source_index"].tolist()])
        np.testing.assert_array_equal(np.sort(old), np.flatnonzero(parts_of_row >= 0))
        np.testing.assert_array_equal(pixels(found), pixels(whole)[old])
        for name in ("rotations", "shifts", "ctf", "slice", "stack"):
            np.testing.assert_array_equal(found[name], whole[name][old], err_msg=name)
    shutil.rmtree(folder)


# --- add -------------------------------------------------------------------------------------------------------------


def test_added_particles_are_prepared_like_the_old_ones(stores, tmp_path, merged):
    source = Path(attributes(stores[1])["inputs"][0]["path"])
    said = add(stores[0], source, tmp_path / "out", workers=1)
    assert str(source) in said
    found, expected = arrays(tmp_path / "out"), arrays(merged)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert verify_store(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert add(stores[0], source, tmp_path / "out", workers=1) == said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_what_cannot_be_added_is_refused_and_leaves_nothing(stores, tmp_path, refusal, write_particles):
    out = tmp_path / "out"
    finer = write_particles(tmp_path / "finer", pixel_size=1.5)
    refusal(StoreError, [str(finer), "1.5 Å/px", "2 Å/px"], lambda: add(stores[0], finer, out, workers=1))
    refusal(SourceError, ["none.star"], lambda: add(stores[0], tmp_path / "none.star", out, workers=1))
    own = Path(attributes(stores[0])["inputs"][0]["path"])
    words = [f"{own}: 200 of its particles are also in {stores[0]}", "/stacks/part"]
    for _ in range(2):
        refusal(StoreError, words, lambda: add(stores[0], own, out, workers=1))
    damaged = write_particles(tmp_path / "damaged")
    with mrcfile.open(tmp_path / "damaged/stacks/part01.mrcs", "r+") as mrc:
        assert mrc.data is not None
        mrc.data[3] = np.nan
    refusal(SourceError, ["part01.mrcs"], lambda: add(stores[0], damaged, out, workers=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "finer"]
    refusal(StoreError, [str(stores[1])], lambda: add(stores[0], own, stores[1], workers=1))


def test_shared_particles_are_refused_before_their_images_are_made(stores, tmp_path, refusal, monkeypatch):
    def make_no_image(*_: Any) -> None:
        raise AssertionError("images are made")

    monkeypatch.setattr(edit, "complete", make_no_image)
    own = Path(attributes(stores[0])["inputs"][0]["path"])
    refusal(StoreError, ["200 of its particles"], lambda: add(stores[0], own, tmp_path / "out", workers=1))


def test_an_add_is_known_again_from_another_folder(stores, tmp_path, monkeypatch):
    source, out = Path(attributes(stores[1])["inputs"][0]["path"]), tmp_path / "out"
    monkeypatch.chdir(source.parent)
    said = add(stores[0], Path(source.name), out, workers=1)
    monkeypatch.chdir(tmp_path)
    assert add(stores[0], Path(os.path.relpath(source)), Path("out"), workers=1) == said


def test_what_another_add_left_is_no_hindrance(stores, tmp_path, merged, write_particles):
    out = tmp_path / "out"
    prepare(write_particles(tmp_path / "else"), tmp_path / ".out.new", only_begin=True, **SMALL)
    add(stores[0], Path(attributes(stores[1])["inputs"][0]["path"]), out, workers=1)
    np.testing.assert_array_equal(arrays(out)["images"], arrays(merged)["images"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "out"]


@pytest.mark.parametrize("shards", [0, 2])
def test_an_add_that_was_cut_off_goes_on(stores, tmp_path, merged, shards):
    """As a kill leaves it: the new particles' store unfinished, or the merge."""
    source, out = Path(attributes(stores[1])["inputs"][0]["path"]), tmp_path / "out"
    add(stores[0], source, out, workers=1)
    expected = contents(out)
    (out / "manifest.json").unlink()
    for shard in range(shards, 6):
        os.unlink(out / f"images/c/{shard}/0/0")
    add(stores[0], source, out, workers=1)
    assert contents(out) == expected
