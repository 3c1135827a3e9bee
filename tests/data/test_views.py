"""Halves of a store: disjoint, covering, whole chunks, and the same rows as the store's."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import HALVES, half_rows, half_view
from spire_dist.errors import StoreError

TABLES = ("rotations", "shifts", "ctf", "optics_group", "source", "source_index", "stack", "slice", "input_pixel_size")


@pytest.fixture(scope="module", params=["float16", "compact"])
def whole(request, tmp_path_factory, write_particles) -> ParticleStore:
    """450 particles in chunks of 64 and shards of 128: the last chunk is short, and so is the last shard."""
    folder = tmp_path_factory.mktemp("whole")
    star = write_particles(folder / "in", count=450)
    return ParticleStore.open(prepare(star, folder / "store", images_per_shard=128, dtype=request.param))


@given(count=st.integers(2, 3000), chunk=st.sampled_from([1, 2, 16, 64]))
def test_halves_are_disjoint_cover_the_store_and_cut_no_chunk(count, chunk):
    store = SimpleNamespace(count=count, images_per_chunk=chunk)
    first, second = (half_rows(store, half) for half in HALVES)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(count))
    assert not set(first // chunk) & set(second // chunk)
    assert 0 <= len(first) - len(second) <= chunk or 0 < len(second) - len(first) < chunk
    for rows in (first, second):
        assert (np.diff(rows) > 0).all()
        # Row i of the half is image i % chunk of its chunk i // chunk: only the last chunk may be short.
        np.testing.assert_array_equal(rows % chunk, np.arange(len(rows)) % chunk)


@pytest.mark.parametrize("half", HALVES)
def test_a_half_has_the_rows_of_its_store_and_no_copy_of_their_images(whole, tmp_path, half):
    view, rows = half_view(whole, tmp_path / "half", half), half_rows(whole, half)
    assert view.count == len(rows)
    np.testing.assert_array_equal(view.read(np.arange(view.count)), whole.read(rows))
    some = np.random.default_rng(0).integers(0, view.count, 50)
    np.testing.assert_array_equal(view.stored(some), whole.stored(rows[some]))
    for name in TABLES:
        np.testing.assert_array_equal(getattr(view, name), getattr(whole, name)[rows])
    assert (view.path / "images" / "c").is_symlink()
    assert view.fingerprint not in (whole.fingerprint, half_view(whole, tmp_path / "o", HALVES[2 - half]).fingerprint)


def test_zarr_refuses_a_half_rather_than_read_other_images(whole, tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(half_view(whole, tmp_path / "half", 1).path, mode="r")
    with pytest.raises(Exception, match="chunks_of_another_store"):
        _ = group["images"]


def test_a_half_is_made_once_follows_its_store_and_refuses_another(whole, tmp_path, refusal):
    view = half_view(whole, tmp_path / "half", 2)
    images, before = view.read([0, 100]), (view.path / "manifest.json").stat().st_mtime_ns
    link = view.path / "images" / "c"
    link.unlink()
    link.symlink_to(tmp_path / "where it was", target_is_directory=True)
    again = half_view(whole, tmp_path / "half", 2)
    assert (view.path / "manifest.json").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.read([0, 100]), images)
    other = replace(whole, fingerprint="0" * 64)
    refusal(StoreError, ["another store"], lambda: half_view(other, tmp_path / "half", 2))


def test_what_cannot_be_halved_is_refused(whole, tmp_path, refusal, write_particles):
    few = ParticleStore.open(prepare(write_particles(tmp_path / "in", count=60), tmp_path / "few"))
    refusal(StoreError, ["60 particles", "too few"], lambda: half_view(few, tmp_path / "half", 1))
    expanded = replace(whole, stack=np.zeros(450, np.int32), slice=np.arange(450, dtype=np.int32) // 2 * 0)
    refusal(StoreError, ["more than once", "each image is once"], lambda: half_view(expanded, tmp_path / "half", 1))
    assert not (tmp_path / "half").exists()


def test_the_attributes_of_a_half_count_its_own_particles(whole, tmp_path):
    view = half_view(whole, tmp_path / "half", 2)
    assert json.loads((view.path / "zarr.json").read_text())["attributes"]["count"] == view.count
