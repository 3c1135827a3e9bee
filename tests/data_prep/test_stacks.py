"""Stacks: what mrcfile reads is the truth; what cannot be read is refused by name."""

import mrcfile
import numpy as np
import pytest

from data_prep.locate import find_stack
from data_prep.stacks import open_stack, read_slices
from spire_dist.errors import SourceError


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
    path = tmp_path / "cut.mrcs"
    with mrcfile.new(path) as mrc:
        mrc.set_data(_noise(5, 16))
    path.write_bytes(path.read_bytes()[: 1024 + 3 * 16 * 16 * 4 + 10])
    refusal(SourceError, [str(path), "truncated", "3 of the 5"], lambda: open_stack(path))


@pytest.mark.parametrize("content", [b"", b"not an MRC file", bytes(5000)])
def test_a_file_that_is_no_stack_is_refused(tmp_path, refusal, content):
    path = tmp_path / "a.mrcs"
    path.write_bytes(content)
    refusal(SourceError, [str(path)], lambda: open_stack(path))


def test_images_that_are_not_square_are_refused(tmp_path, refusal):
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(np.zeros((2, 10, 12), dtype=np.float32))
    refusal(SourceError, ["12 × 10"], lambda: open_stack(tmp_path / "a.mrcs"))


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
