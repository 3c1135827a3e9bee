"""Stacks are found wherever they were moved to, all that are missing are told at once, and no two become one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import locate
from data_prep.locate import check_paths, find_beside, find_stack, find_stacks, renamed
from spire_dist.errors import ConfigError, SourceError


@pytest.fixture
def source(tmp_path) -> Path:
    """A STAR file three folders deep in a project; only its place matters."""
    path = tmp_path / "project" / "Refine3D" / "job2" / "run_data.star"
    path.parent.mkdir(parents=True)
    return path


def _touch(*paths: Path) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list(paths)


def test_names_are_relative_to_the_project_or_to_the_file_or_absolute(source, tmp_path):
    project = source.parents[2]
    paths = _touch(project / "Extract/job1/a.mrcs", source.parent / "b.mrcs", tmp_path / "far" / "c d.mrcs")
    assert find_stacks(["Extract/job1/a.mrcs", "b.mrcs", str(paths[2])], source) == paths
    assert find_stacks(["../../Extract/job1/a.mrcs"], source)[0].resolve() == paths[0]
    assert check_paths(["Extract/job1/a.mrcs", "b.mrcs"], source) == []


@pytest.mark.parametrize("moved", ["Extract/job1/Movies/a.mrcs", "job1/Movies/a.mrcs", "Movies/a.mrcs", "a.mrcs"])
@pytest.mark.parametrize("name", ["Extract/job1/Movies/a.mrcs", "/old/disk/Extract/job1/Movies/a.mrcs"])
def test_datadir_may_be_any_folder_above_the_stack(source, tmp_path, moved, name):
    (path,) = _touch(tmp_path / "elsewhere" / moved)
    assert find_stack(name, source, tmp_path / "elsewhere") == path


def test_datadir_goes_before_the_places_where_a_stack_used_to_be(source, tmp_path):
    old, new = _touch(source.parent / "a.mrcs", tmp_path / "scratch" / "a.mrcs")
    assert find_stack("a.mrcs", source, tmp_path / "scratch") == new
    assert find_stack(str(old), source, tmp_path / "scratch") == new


def test_a_prefix_is_removed_from_the_names_that_begin_with_it(source, tmp_path):
    a, b = _touch(source.parents[2] / "Extract/a.mrcs", source.parents[2] / "b.mrcs")
    names = ["/old/disk/Extract/a.mrcs", "b.mrcs"]
    assert find_stacks(names, source, strip_prefix="/old/disk") == [a, b]
    assert find_stacks(names, source, strip_prefix="/old/disk/") == [a, b]


def test_the_other_ending_is_tried_and_told(source):
    a, b = _touch(source.parent / "a.mrc", source.parent / "b.mrcs")
    paths = find_stacks(["a.mrcs", "b.mrcs"], source)
    assert paths == [a, b]
    assert renamed(["a.mrcs", "b.mrcs"], paths) == f"1 of 2 stacks found under another ending: a.mrcs is {a}"
    assert renamed(["b.mrcs"], [b]) == ""
    assert find_stack("b.mrc", source) == b


def test_a_stack_of_the_right_ending_goes_first_wherever_it_is(source):
    _touch(source.parent / "a.mrc")
    (right,) = _touch(source.parents[2] / "a.mrcs")
    assert find_stack("a.mrcs", source) == right


def test_all_missing_stacks_are_counted_and_the_first_named(source, tmp_path, refusal):
    _touch(source.parent / "s2.mrcs")
    names = [f"s{i}.mrcs" for i in range(6)]
    words = [str(source), "5 of 6 stacks", "(s0.mrcs, s1.mrcs, s3.mrcs, ...)", "4 folders above", "datadir"]
    message = refusal(SourceError, words, lambda: find_stacks(names, source))
    assert check_paths(names, source) == [message, *(f"missing: s{i}.mrcs" for i in (0, 1, 3, 4, 5))]
    refusal(SourceError, ["5 of 6", f"in {source.parent}"], lambda: find_stacks(names, source, source.parent))


def test_a_prefix_that_would_help_is_named(source, refusal):
    _touch(source.parents[2] / "Extract/a.mrcs")
    names = ["/old/disk/Extract/a.mrcs", "/old/disk/Extract/b.mrcs"]
    refusal(SourceError, ["2 of 2", "strip_prefix '/old/disk/'"], lambda: find_stacks(names, source))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strip_prefix": "/new"}, ["strip_prefix", "'/new'", "/old/a.mrcs"]),
        ({"datadir": Path("/no/such/folder")}, ["datadir", "/no/such/folder", "not a folder"]),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(source, refusal, options, words):
    message = refusal(ConfigError, words, lambda: find_stacks(["/old/a.mrcs"], source, **options))
    assert check_paths(["/old/a.mrcs"], source, **options) == [message]


@pytest.mark.parametrize(
    ("names", "there", "datadir"),
    [
        (["Movies1/a.mrcs", "Movies2/a.mrcs"], "a.mrcs", True),  # by the bare name, one would be taken for the other
        (["a.mrcs", "a.mrc"], "a.mrc", False),
        (["a.mrc", "a.mrcs"], "a.mrc", False),
    ],
)
def test_two_names_never_become_the_same_stack(source, refusal, names, there, datadir):
    _touch(source.parent / there)
    words = [str(source), *names, "both lead to"]
    refusal(SourceError, words, lambda: find_stacks(names, source, source.parent if datadir else None))


def test_two_ways_to_write_a_path_are_the_same_stack(source):
    (path,) = _touch(source.parent / "x" / "a.mrcs")
    assert find_stacks(["x/a.mrcs", "x//a.mrcs", "./x/a.mrcs", str(path)], source) == [path] * 4


def test_a_folder_is_listed_once_however_many_stacks_it_holds(source, monkeypatch):
    names = [f"Extract/job{i % 3}/{i}.mrcs" for i in range(300)]
    _touch(*(source.parents[2] / name for name in names))
    asked = []
    listing = locate._listing
    monkeypatch.setattr(locate, "_listing", lambda folder: asked.append(folder) or listing(folder))
    assert len(find_stacks(names, source)) == 300
    assert len(asked) == len(set(asked)) == 3 * 3  # three folders, each in three places


@given(st.lists(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=30), min_size=1))
def test_no_name_raises_anything_but_a_line_of_refusal(tmp_path_factory, parts):
    source = tmp_path_factory.mktemp("names") / "a.star"
    for datadir in (None, source.parent):
        for line in check_paths(["/".join(parts)], source, datadir):
            assert line


def test_a_file_that_another_names_is_found_beside_it_or_in_the_project(source, refusal):
    (path,) = _touch(source.parents[2] / "Tomograms/tomograms.star")
    assert find_beside("Tomograms/tomograms.star", source) == path
    refusal(SourceError, [str(source), "gone.star"], lambda: find_beside("gone.star", source))
