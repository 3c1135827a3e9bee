"""Stacks: what mrcfile reads is the truth; what cannot be read is refused by name."""

import errno
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from mrcfile.dtypes import HEADER_DTYPE

from data_prep import stacks
from data_prep.locate import find_stack
from data_prep.stacks import open_stack, read_slices
from spire_dist.errors import SourceError


def _written(path: Path, images: np.ndarray, **header) -> Path:
    """A stack made by mrcfile, with fields of its header changed."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(images)
    content = bytearray(path.read_bytes())
    order = images.dtype.newbyteorder("=" if images.dtype.byteorder in "=|" else images.dtype.byteorder).byteorder
    fields = np.frombuffer(content, HEADER_DTYPE.newbyteorder(order), count=1)  # a view: writes into `content`
    for name, value in header.items():
        fields[name] = value
    path.write_bytes(content)
    return path


def _noise(count: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, box, box)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32])
def test_every_real_mode_is_read_as_mrcfile_reads_it(tmp_path, dtype):
    images = (
        (10 * _noise(5, 12)).astype(dtype) if dtype != np.uint16 else np.arange(720, dtype=dtype).reshape(5, 12, 12)
    )
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(images)
        mrc.voxel_size = 1.5
    stack = open_stack(tmp_path / "a.mrcs")
    assert (stack.count, stack.box, stack.header_pixel_size) == (5, 12, pytest.approx(1.5))
    np.testing.assert_array_equal(read_slices(stack, np.array([4, 0, 4])), images[[4, 0, 4]].astype(np.float32))


def test_a_big_endian_stack_with_an_extended_header_is_read(tmp_path):
    images = _noise(3, 10)
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(images.astype(">f4"))
        mrc.set_extended_header(np.zeros(320, dtype="V1"))
    stack = open_stack(tmp_path / "a.mrcs")
    assert stack.offset == 1344
    np.testing.assert_array_equal(read_slices(stack, np.arange(3)), images)


def test_a_stack_whose_header_lacks_the_map_word_is_read(shared_data):
    stack = open_stack(shared_data / "particles/ml-struct-bio+cryodrgn/tests/data/toy_projections.mrcs")
    with pytest.warns(RuntimeWarning, match="Map ID"), mrcfile.open(stack.path, permissive=True) as mrc:
        np.testing.assert_array_equal(read_slices(stack, np.array([5, 999])), mrc.data[[5, 999]])


def test_a_truncated_stack_is_refused_with_what_it_holds(tmp_path, refusal):
    path = _written(tmp_path / "cut.mrcs", _noise(5, 16))
    path.write_bytes(path.read_bytes()[: 1024 + 3 * 16 * 16 * 4 + 10])
    refusal(SourceError, [str(path), "truncated", "3 of the 5"], lambda: open_stack(path))


def test_a_file_longer_than_its_header_says_is_taken_at_its_word(tmp_path):
    images = _noise(3, 8)
    path = _written(tmp_path / "a.mrcs", images)
    with open(path, "ab") as file:
        file.write(b"left over")
    stack = open_stack(path)
    assert (stack.count, stack.bytes) == (3, 1024 + images.nbytes + 9)
    np.testing.assert_array_equal(read_slices(stack, np.arange(3)), images)


@pytest.mark.parametrize("kind", [b"FEI1", b"SERI", b"\0\0\0\0"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_extended_header_of_any_kind_and_byte_order_is_passed_over(tmp_path, kind, order):
    images = _noise(3, 10).astype(f"{order}f4")
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(images)
        mrc.set_extended_header(np.frombuffer(b"\x07" * 333, dtype="V1"))
        mrc.header.exttyp = kind
    stack = open_stack(tmp_path / "a.mrcs")
    assert (stack.offset, stack.dtype) == (1024 + 333, f"{order}f4")
    np.testing.assert_array_equal(read_slices(stack, np.arange(3)), images)


@pytest.mark.parametrize("stamp", [(0x44, 0x44, 0, 0), (0x11, 0x11, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_wrong_machine_stamp_does_not_mislead(tmp_path, stamp, order):
    images = _noise(2, 16).astype(f"{order}f4")
    stack = open_stack(_written(tmp_path / "a.mrcs", images, machst=stamp))
    assert stack.dtype == f"{order}f4"
    np.testing.assert_array_equal(read_slices(stack, np.arange(2)), images)


@pytest.mark.parametrize(
    ("header", "pixel_size"),
    [({"cella": 0}, 0.0), ({"mx": 0}, 0.0), ({"cella": np.nan}, 0.0), ({"cella": -5}, 0.0), ({"cella": 24}, 3.0)],
)
def test_a_header_without_a_sensible_pixel_size_says_zero(tmp_path, header, pixel_size):
    if "cella" in header:
        header = {"cella": np.array((header["cella"],) * 3, dtype=HEADER_DTYPE["cella"])}
    assert open_stack(_written(tmp_path / "a.mrcs", _noise(2, 8), **header)).header_pixel_size == pixel_size


@pytest.mark.parametrize("content", [b"", b"not an MRC file", bytes(5000), b"\xff" * 5000, b"MAP " * 300])
def test_a_file_that_is_no_stack_is_refused(tmp_path, refusal, content):
    path = tmp_path / "a.mrcs"
    path.write_bytes(content)
    refusal(SourceError, [str(path), "not an MRC stack"], lambda: open_stack(path))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"mode": 3}, ["mode 3", "complex integers"]),
        ({"mode": 4}, ["mode 4", "complex numbers"]),
        ({"mode": 101}, ["mode 101", "4-bit"]),
        ({"mode": 7}, ["unknown mode 7"]),
        ({"nz": 2**31 - 1}, ["truncated", "2 of the 2147483647"]),
        ({"nz": -1}, ["-1 images"]),
        ({"nx": 2**30}, ["1073741824"]),
        ({"nsymbt": -8}, ["extended header of -8 bytes"]),
        ({"nsymbt": 2**30}, ["truncated", "0 of the 2"]),
        ({"mapc": 3, "maps": 1}, ["(3, 2, 1)", "mapc"]),
        ({"ispg": 401, "mz": 2}, ["stack of volumes of 2 sections"]),
    ],
)
def test_a_header_that_describes_anything_else_is_refused_by_name(tmp_path, refusal, header, words):
    path = _written(tmp_path / "a.mrcs", _noise(2, 12), **header)
    refusal(SourceError, [str(path), *words], lambda: open_stack(path))


@pytest.mark.parametrize(
    "header", [{"ispg": 1, "mz": 2}, {"mz": 1}, {"ispg": 401, "mz": 1}, {"mapc": 0, "mapr": 0, "maps": 0}]
)
def test_oddities_that_say_nothing_about_the_images_are_passed_over(tmp_path, header):
    images = _noise(2, 12)
    stack = open_stack(_written(tmp_path / "a.mrcs", images, **header))
    np.testing.assert_array_equal(read_slices(stack, np.arange(2)), images)


@pytest.mark.parametrize("name", ["a.mrcs.gz", "a.mrcs.BZ2"])
def test_a_compressed_stack_is_refused_with_what_to_do(tmp_path, refusal, name):
    refusal(SourceError, [name, "compressed", "unpack"], lambda: open_stack(tmp_path / name))


def test_a_folder_and_a_missing_file_are_refused(tmp_path, refusal):
    refusal(SourceError, [str(tmp_path), "directory"], lambda: open_stack(tmp_path))
    refusal(SourceError, ["absent.mrcs", "No such file"], lambda: open_stack(tmp_path / "absent.mrcs"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read any file")
def test_a_stack_that_may_not_be_read_is_refused(tmp_path, refusal):
    path = _written(tmp_path / "a.mrcs", _noise(2, 8))
    path.chmod(0)
    refusal(SourceError, [str(path), "Permission denied"], lambda: open_stack(path))


def test_images_that_are_not_square_are_refused(tmp_path, refusal):
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(np.zeros((2, 10, 12), dtype=np.float32))
    refusal(SourceError, ["12 × 10"], lambda: open_stack(tmp_path / "a.mrcs"))


@pytest.mark.parametrize("dtype", ["i1", "<i2", ">i2", "<u2", "<f2", "<f4", ">f4"])
@pytest.mark.parametrize("slices", [[2, 3, 4, 5], [0], [6, 0, 1, 1, 4, 5], list(range(7)), []])
def test_slices_in_any_order_are_what_mrcfile_reads(tmp_path, dtype, slices):
    stack = open_stack(_written(tmp_path / "a.mrcs", (10 * np.abs(_noise(7, 6))).astype(dtype)))
    found = read_slices(stack, np.array(slices, dtype=int))
    assert found.dtype == np.float32
    with mrcfile.open(stack.path) as mrc:
        np.testing.assert_array_equal(found, mrc.data[slices].astype(np.float32) if slices else np.empty((0, 6, 6)))


def test_a_stack_that_was_shortened_or_removed_after_it_was_opened_is_refused(tmp_path, refusal):
    stack = open_stack(_written(tmp_path / "a.mrcs", _noise(4, 8)))
    os.truncate(stack.path, stack.bytes - 1)
    np.testing.assert_array_equal(read_slices(stack, np.arange(3)), _noise(4, 8)[:3])
    refusal(SourceError, [str(stack.path), "image 4"], lambda: read_slices(stack, np.array([2, 3])))
    stack.path.unlink()
    refusal(SourceError, [str(stack.path), "No such file"], lambda: read_slices(stack, np.array([0])))


def test_pixels_so_large_that_their_sum_overflows_are_finite_pixels(tmp_path):
    images = np.full((1, 8, 8), 3e38, dtype=np.float32)
    with np.errstate(over="ignore"):  # mrcfile's own statistics
        stack = open_stack(_written(tmp_path / "a.mrcs", images))
    np.testing.assert_array_equal(read_slices(stack, np.array([0])), images)


def test_a_pixel_that_is_not_a_number_is_refused_by_image(tmp_path, refusal):
    images = _noise(4, 8)
    images[2, 3, 3] = np.nan
    with pytest.warns(RuntimeWarning, match="NaN"), mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(images)
    stack = open_stack(tmp_path / "a.mrcs")
    refusal(SourceError, ["a.mrcs", "image 3"], lambda: read_slices(stack, np.array([0, 2])))


@pytest.mark.parametrize("written_as", ["Extract/job1/a.mrcs", "a.mrcs"])
def test_a_stack_is_found_from_the_project_folder_and_under_datadir(tmp_path, refusal, written_as):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    source = project / "Refine3D" / "job2" / "run_data.star"
    for folder in (source.parent, project / "Extract" / "job1", elsewhere):
        folder.mkdir(parents=True)
    (elsewhere / "a.mrcs").touch()
    assert find_stack(written_as, source, elsewhere) == elsewhere / "a.mrcs"
    refusal(SourceError, [str(source), written_as, "datadir"], lambda: find_stack(written_as, source, None))
    (project / written_as).touch()
    assert find_stack(written_as, source, None) == project / written_as
    assert find_stack(str(elsewhere / "a.mrcs"), source, None) == elsewhere / "a.mrcs"


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_system_that_cannot_read_past_its_cache_reads_through_it(tmp_path, monkeypatch, error):
    images = _noise(5, 8)
    stack = open_stack(_written(tmp_path / "a.mrcs", images))
    preadv = os.preadv

    def older(file, buffers, start, flags=0):
        if flags:
            raise OSError(error, os.strerror(error))
        return preadv(file, buffers, start)

    monkeypatch.setattr(stacks.os, "preadv", older)
    np.testing.assert_array_equal(read_slices(stack, np.arange(5)), images)
