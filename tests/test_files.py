"""Files that are complete or absent, also where the system refuses to write past its cache."""

import errno
import os

import numpy as np
import pytest

from spire_dist import files
from spire_dist.files import replacing, write_uncached

SIZES = [0, 1, files.PAGE - 1, files.PAGE, 5 * files.PAGE + 17, 2 * files.PIECE, 2 * files.PIECE + 3 * files.PAGE + 1]


def _bytes(size: int) -> memoryview:
    """As many bytes at the beginning of a page, where writing past the cache needs them to be."""
    room = np.random.default_rng(size).integers(0, 256, size + files.PAGE, dtype=np.uint8)
    return room[-room.ctypes.data % files.PAGE :][:size].data


@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_past_the_cache_and_the_rest_make_the_file(tmp_path, size):
    path, data = tmp_path / "file", _bytes(size)
    path.write_bytes(b"longer, and from before" * 1000)
    done = write_uncached(path, data)
    assert done in (0, size // files.PAGE * files.PAGE)
    if done:
        assert path.read_bytes() == data[:done]


@pytest.mark.parametrize("size", [files.PAGE, 2 * files.PIECE + 5])
@pytest.mark.parametrize("call", ["open", "write"])
def test_nothing_is_written_where_the_file_system_cannot_do_without_its_cache(tmp_path, monkeypatch, size, call):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, call, refuse)
    assert write_uncached(tmp_path / "file", _bytes(size)) == 0


def test_a_full_disk_is_no_reason_to_go_on(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_uncached(tmp_path / "file", _bytes(files.PAGE))


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, shared):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail_half_way() -> None:
        with replacing(path, flushed=True, shared=shared) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert os.listdir(tmp_path) == ["a.json"]
    with replacing(path, flushed=True, shared=shared) as partial:
        partial.write_text("new")
    assert (os.listdir(tmp_path), path.read_text()) == (["a.json"], "new")
