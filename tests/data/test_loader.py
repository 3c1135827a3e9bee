"""Batches: the same bits from memory and from disk, and no error lost in the reading thread."""

import shutil
import threading

import numpy as np
import pytest
import scipy.fft
import torch

from spire_dist.data.loader import BatchSource, Prefetcher
from spire_dist.data.order import batches
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError

FIELDS = ("rows", "images", "ctf", "rotations", "shifts_px")


@pytest.fixture
def store(tiny_store):
    return ParticleStore.open(tiny_store)


def test_streamed_batches_are_the_resident_ones_bit_for_bit(store):
    streamed, resident = BatchSource(store, 0.0), BatchSource(store, 1.0)
    assert streamed.resident is None
    assert resident.resident is not None
    for rows in (np.arange(240), np.array([239, 0, 64, 63, 130]), np.array([7])):
        for field in FIELDS:
            assert torch.equal(getattr(streamed.batch(rows), field), getattr(resident.batch(rows), field))


def test_a_batch_holds_the_transforms_and_poses_of_its_rows(store):
    rows = np.array([200, 3, 77])
    batch = BatchSource(store, 0.0).batch(rows)
    np.testing.assert_allclose(batch.images.numpy(), scipy.fft.rfft2(store.read(rows)), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(batch.rotations.numpy(), store.rotations[rows])
    np.testing.assert_allclose(batch.shifts_px.numpy() * 16.0, store.shifts[rows], rtol=1e-6)
    np.testing.assert_array_equal(batch.rows.numpy(), rows)
    assert batch.ctf.shape == (3, 24, 13)


def test_the_sequence_is_all_particles_in_store_order(store):
    rows = torch.cat([batch.rows for batch in BatchSource(store, 0.0).sequence(50)])
    np.testing.assert_array_equal(rows.numpy(), np.arange(240))


def test_prefetched_batches_come_in_the_order_of_the_steps(store):
    expected = batches(240, 32, 5, 11)
    data = Prefetcher(BatchSource(store, 0.0), 32, 5, 11)
    try:
        for _ in range(20):
            np.testing.assert_array_equal(data.next().rows.numpy(), next(expected))
    finally:
        data.close()


def test_closing_ends_the_reading_thread_even_with_a_full_queue(store):
    before = threading.active_count()
    data = Prefetcher(BatchSource(store, 1.0), 32, 0)
    data.next()
    data.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_trainer(tmp_path, tiny_store, refusal):
    copy = tmp_path / "store"
    shutil.copytree(tiny_store, copy)
    source = BatchSource(ParticleStore.open(copy), 0.0)
    shard = copy / "images" / "c" / "2" / "0" / "0"
    shard.unlink()
    data = Prefetcher(source, 240, 0)
    try:
        refusal(StoreError, [str(shard), "damaged"], data.next)
    finally:
        data.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named_by_its_row_in_the_input(store, refusal, value):
    source = BatchSource(store, 1.0)
    assert source.resident is not None
    source.resident[[17, 40], 5, 5] = value
    names = [str(store.source_index[row] + 1) for row in (17, 40)]
    refusal(StoreError, [str(store.path), *names], lambda: source.batch(np.arange(64)))
    source.batch(np.array([16, 18]))
