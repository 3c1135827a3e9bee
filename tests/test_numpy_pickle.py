"""The restricted unpickler: arrays come in as pickle would load them, anything else is refused before it runs."""

import contextlib
import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from spire_dist import numpy_pickle
from spire_dist.errors import SourceError


class _RunsCode:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_in_containers_come_back_equal_at_every_protocol(tmp_path, protocol):
    content = (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        {"labels": [np.array([1, -2, 3]), np.float64(2.5)], "name": "å", "none": None},
        np.asfortranarray(np.eye(3)),
    )
    path = tmp_path / "content.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = numpy_pickle.load(path)
    np.testing.assert_array_equal(loaded[0], content[0])
    assert loaded[0].dtype == np.float32
    np.testing.assert_array_equal(loaded[1]["labels"][0], content[1]["labels"][0])
    assert (loaded[1]["labels"][1], loaded[1]["name"], loaded[1]["none"]) == (2.5, "å", None)
    np.testing.assert_array_equal(loaded[2], np.eye(3))


@pytest.mark.parametrize("hide_in", [lambda x: x, lambda x: (np.eye(3), [x]), lambda x: np.array([x], dtype=object)])
def test_a_pickle_that_would_run_a_command_is_refused_and_does_not_run_it(tmp_path, refusal, hide_in):
    trace = tmp_path / "it_ran"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(hide_in(_RunsCode(f"touch {trace}"))))
    refusal(SourceError, [str(path), "system"], lambda: numpy_pickle.load(path))
    assert not trace.exists()


def test_other_classes_are_refused_by_name(tmp_path, refusal):
    path = tmp_path / "ordered.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(a=1)))
    refusal(SourceError, ["collections.OrderedDict"], lambda: numpy_pickle.load(path))


@pytest.mark.parametrize("content", [b"", b"_rlnImageName #1\n", pickle.dumps(np.eye(3))[:-20]])
def test_a_file_that_is_no_pickle_or_is_cut_short_is_refused_in_one_line(tmp_path, refusal, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    refusal(SourceError, [str(path)], lambda: numpy_pickle.load(path))


def _asks_for(shape: tuple[int, ...]) -> bytes:
    """A pickle that calls numpy's `_reconstruct` for an array of Python objects, 8 bytes each."""
    return pickle.dumps(np.zeros(3), protocol=2).replace(pickle.dumps((0,), 2)[2:-1], pickle.dumps(shape, 2)[2:-1], 1)


HUGE = {
    "an array of objects": _asks_for((2**40,)),
    "numpy.ndarray called": b"cnumpy\nndarray\n(" + pickle.dumps((2**40,), 2)[2:-1] + b"tR.",
    "a memo": pickle.dumps(np.zeros(3), protocol=2).replace(b"q\x00", b"r\xff\xff\xff\xff", 1),
    "bytes": b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b"few.",
}


@pytest.mark.parametrize("content", HUGE.values(), ids=HUGE.keys())
def test_a_pickle_that_asks_for_more_memory_than_it_has_bytes_is_given_none(tmp_path, content):
    path = tmp_path / "huge.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(SourceError):
        np.testing.assert_array_equal(numpy_pickle.load(path), np.zeros(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_missing_file_is_refused_by_name(tmp_path, refusal):
    refusal(SourceError, ["absent.pkl", "No such file"], lambda: numpy_pickle.load(tmp_path / "absent.pkl"))


@pytest.mark.parametrize("name", ["pose.star.pkl", "ctf1.pkl", "test_ctf.pkl", "toy_rot_trans.pkl"])
def test_cryodrgns_own_pickles_load_as_pickle_loads_them(shared_data: Path, name):
    path = shared_data / "particles/ml-struct-bio+cryodrgn/tests/data" / name
    expected, loaded = pickle.loads(path.read_bytes()), numpy_pickle.load(path)
    assert type(loaded) is type(expected)
    pairs = zip(expected, loaded, strict=True) if isinstance(expected, tuple) else [(expected, loaded)]
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.npy", b""),
        ("zip.npy", b"PK\x03\x04junk"),
        ("header.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8', "),
        ("empty.txt", b""),
        ("comment.txt", b"# no rows\n"),
        ("prose.txt", b"a b\n"),
        ("binary.txt", b"\xff\xfe\x00"),
        ("empty.pkl", b""),
        ("none.npy", None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_file_without_numbers_is_refused_in_one_line(tmp_path, refusal, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refusal(SourceError, [str(tmp_path / name)], lambda: numpy_pickle.load_numbers(tmp_path / name, int))


def test_an_array_file_that_promises_more_than_it_holds_reserves_nothing(tmp_path, refusal):
    path = tmp_path / "huge.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**10,)})
        file.write(bytes(32))
    tracemalloc.start()
    try:
        refusal(SourceError, [str(path)], lambda: numpy_pickle.load_numbers(path))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["npy", "pkl", "pickle", "txt"])
def test_an_array_is_the_same_from_every_kind_of_file(tmp_path, kind):
    numbers, path = np.array([3, -1, 2**40]), tmp_path / f"numbers.{kind}"
    if kind == "npy":
        np.save(path, numbers)
    else:
        path.write_text("3\n-1\n1099511627776\n") if kind == "txt" else path.write_bytes(pickle.dumps(numbers))
    found = numpy_pickle.load_numbers(path, int)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, numbers)
