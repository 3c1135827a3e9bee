"""Batches: the same bits from memory and from disk, and no error lost in the reading thread."""

import shutil
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import scipy.fft
import torch

from spire_dist.data.loader import Batch, BatchSource, Prefetcher
from spire_dist.data.resident import resident_images
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError

CPU = torch.device("cpu")
TENSORS = ("rows", "images", "ctf", "rotations", "shifts_px")


@pytest.fixture
def store(tiny_store):
    return ParticleStore.open(tiny_store)


@pytest.fixture
def resident(store):
    return BatchSource(store, resident_images(store, "always", CPU))


def assert_same(found: Batch, expected: Batch) -> None:
    assert found.total == expected.total
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_streamed_batches_are_the_resident_ones_bit_for_bit(store, resident):
    streamed = BatchSource(store)
    for rows in (np.arange(240), np.array([239, 0, 64, 63, 130]), np.array([7])):
        assert_same(streamed.batch(rows), resident.batch(rows))
    order = streamed.order(32, 5)
    pairs = zip(streamed.training(order, 3), resident.training(order, 3), strict=False)
    for found, expected in islice(pairs, 2 * order.steps_per_epoch):
        assert_same(found, expected)


def test_a_batch_holds_the_transforms_and_poses_of_its_rows(store):
    rows = np.array([200, 3, 77])
    batch = BatchSource(store).batch(rows)
    np.testing.assert_allclose(batch.images.numpy(), scipy.fft.rfft2(store.read(rows)), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(batch.rotations.numpy(), store.rotations[rows])
    np.testing.assert_allclose(batch.shifts_px.numpy() * 16.0, store.shifts[rows], rtol=1e-6)
    np.testing.assert_array_equal(batch.rows.numpy(), rows)
    assert batch.ctf.shape == (3, 24, 13)
    assert batch.total == 3


def test_the_sequence_is_all_particles_in_store_order(store):
    rows = torch.cat([batch.rows for batch in BatchSource(store).sequence(50)])
    np.testing.assert_array_equal(rows.numpy(), np.arange(240))


@pytest.mark.parametrize("world", [1, 4])
def test_training_batches_are_the_order_of_the_steps_and_hold_only_real_particles(store, world):
    source = BatchSource(store)
    order = source.order(32, 5)
    for rank in range(world):
        for step, batch in enumerate(islice(source.training(order, 11, rank, world), 20), start=11):
            rows = order.rows(step, rank, world)
            assert_same(batch, replace(source.batch(rows[rows >= 0]), total=batch.total))
            assert batch.total == (16 if step % 8 == 7 else 32)  # 240 = 7 × 32 + 16


def test_a_rank_may_have_no_particle_in_a_short_step(store):
    source = BatchSource(store)
    order, seen = source.order(34, 0), []
    for rank in range(34):  # 240 = 7 × 34 + 2
        batch = next(source.training(order, 7, rank, 34))
        assert batch.total == 2
        assert batch.images.shape == batch.ctf.shape == (len(batch.rows), 24, 13)
        assert batch.images.dtype == torch.complex64
        seen.append(len(batch.rows))
    assert sorted(seen) == [0] * 32 + [1, 1]


def test_prefetched_batches_come_in_the_order_of_the_steps(store):
    source = BatchSource(store)
    order = source.order(32, 5)
    data = Prefetcher(source.training(order, 11))
    try:
        for expected in islice(source.training(order, 11), 20):
            assert_same(data.next(), expected)
    finally:
        data.close()


def test_closing_ends_the_reading_threads_even_with_a_full_queue(store):
    before = threading.active_count()
    source = BatchSource(store)
    data = Prefetcher(source.training(source.order(32, 0)))
    data.next()
    data.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_trainer(tmp_path, tiny_store, refusal):
    copy = tmp_path / "store"
    shutil.copytree(tiny_store, copy)
    source = BatchSource(ParticleStore.open(copy))
    shard = copy / "images" / "c" / "2" / "0" / "0"
    shard.unlink()
    data = Prefetcher(source.training(source.order(240, 0)))
    try:
        refusal(StoreError, [str(shard), "damaged"], data.next)
    finally:
        data.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named_by_its_file_and_row(store, refusal, value):
    files = [{"role": "particles", "path": name} for name in ("a.star", "b.star")]
    of_two = {"source": np.arange(240, dtype=np.int32) % 2, "attributes": store.attributes | {"inputs": files}}
    images = store.stored(np.arange(240))
    images[[17, 40], 5, 5] = value
    resident = BatchSource(replace(store, **of_two), images)
    names = [f"{file} row {store.source_index[row] + 1}" for row, file in ((17, "b.star"), (40, "a.star"))]
    refusal(StoreError, [str(store.path), *names], lambda: resident.batch(np.arange(64)))
    resident.batch(np.array([16, 18]))
