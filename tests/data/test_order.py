"""The order of particles, for any set: nothing is left out or repeated, and it can be entered at any step."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_dist.data.order import CHUNKS_PER_GROUP, batches, epoch_order, steps_per_epoch
from spire_dist.schema import IMAGES_PER_CHUNK

counts, sizes, seeds = st.integers(1, 3000), st.integers(1, 400), st.integers(0, 2**32)


@given(count=counts, seed=seeds, epoch=st.integers(0, 1000))
@settings(deadline=None)
def test_an_epoch_is_a_permutation(count, seed, epoch):
    np.testing.assert_array_equal(np.sort(epoch_order(count, seed, epoch)), np.arange(count))


@given(count=counts, batch=sizes, seed=seeds)
@settings(deadline=None)
def test_batches_of_an_epoch_hold_every_particle_once_and_only_the_last_is_short(count, batch, seed):
    steps = steps_per_epoch(count, batch)
    first, second = (list(islice(batches(count, batch, seed, start), steps)) for start in (0, steps))
    for epoch in (first, second):
        assert [len(rows) for rows in epoch[:-1]] == [batch] * (steps - 1)
        assert 1 <= len(epoch[-1]) <= batch
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(count))


@given(count=counts, batch=sizes, seed=seeds, start=st.floats(0, 2.5))
@settings(deadline=None, max_examples=50)
def test_entering_at_any_step_gives_what_the_unbroken_sequence_gives(count, batch, seed, start):
    steps = steps_per_epoch(count, batch)
    first = int(start * steps)
    length = first + 3
    unbroken, resumed = list(islice(batches(count, batch, seed), length)), batches(count, batch, seed, first)
    for expected in unbroken[first:]:
        np.testing.assert_array_equal(next(resumed), expected)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_another_seed_or_epoch_is_another_order(seed, epoch):
    assert not np.array_equal(epoch_order(1000, 0, 0), epoch_order(1000, seed, epoch))


def test_a_batch_touches_the_chunks_of_one_group_only():
    count, group = 100 * IMAGES_PER_CHUNK, CHUNKS_PER_GROUP * IMAGES_PER_CHUNK
    order = epoch_order(count, 3, 0)
    for first in range(0, count, group):
        assert len(np.unique(order[first : first + group] // IMAGES_PER_CHUNK)) <= CHUNKS_PER_GROUP
    assert len(np.unique(order[:IMAGES_PER_CHUNK] // IMAGES_PER_CHUNK)) > 1  # mixed within the group
