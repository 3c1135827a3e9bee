"""The order of particles, for any set: nothing is left out or repeated, and it can be entered at any step."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_dist.data.order import BLOCK_CHUNKS, NOTHING, Order, Portion
from spire_dist.errors import ConfigError

orders = st.builds(
    Order,
    count=st.integers(1, 6000),
    images_per_chunk=st.sampled_from([1, 2, 4, 8, 16, 64]),
    batch=st.integers(1, 300) | st.sampled_from([32, 64, 128, 192, 256, 512, 640, 1000]),
    seed=st.integers(0, 2**33),
)
thousands = settings(max_examples=1500, deadline=None)
hundreds = settings(max_examples=300, deadline=None)


def epoch_of(order: Order, epoch: int, world: int = 1) -> list[list[Portion]]:
    """The portions of an epoch, block by block and rank by rank."""
    first = epoch * order.blocks_per_epoch
    return [[order.portion(first + b, rank, world) for rank in range(world)] for b in range(order.blocks_per_epoch)]


def joined(ranks: list[Portion]) -> np.ndarray:
    """Rows [S, batch] of a block's steps, all ranks side by side."""
    return np.concatenate([portion.rows for portion in ranks], axis=1)


def worlds_of(order: Order) -> list[int]:
    return [world for world in range(1, order.batch + 1) if order.shares(world)]


def runs_of_chunks(order: Order, portion: Portion) -> list[int]:
    """The chunk of every run; a run that crosses a chunk fails."""
    first, last = portion.runs[:, 0], portion.runs.sum(axis=1) - 1
    np.testing.assert_array_equal(first // order.images_per_chunk, last // order.images_per_chunk)
    return list(first // order.images_per_chunk)


@given(order=orders, epoch=st.integers(0, 1000))
@thousands
def test_an_epoch_holds_every_particle_once_and_only_its_last_step_is_short(order, epoch):
    steps = np.concatenate([joined(block) for block in epoch_of(order, epoch)])
    assert steps.shape == (order.steps_per_epoch, order.batch)
    assert (steps[:-1] != NOTHING).all()
    assert (steps[-1] != NOTHING).any()
    np.testing.assert_array_equal(np.sort(steps[steps != NOTHING]), np.arange(order.count))


@given(order=orders, epoch=st.integers(0, 3), data=st.data())
@hundreds
def test_any_number_of_ranks_sees_the_same_steps_and_reads_every_particle_once(order, epoch, data):
    world = data.draw(st.sampled_from(worlds_of(order)))
    for [alone], ranks in zip(epoch_of(order, epoch), epoch_of(order, epoch, world), strict=True):
        np.testing.assert_array_equal(joined(ranks), alone.rows)
        for portion in ranks:
            np.testing.assert_array_equal(portion.totals, (alone.rows != NOTHING).sum(axis=1))
            assert portion.first_step == alone.first_step
        sharing = max(1, world // order.readers)
        for first in range(0, world, sharing):  # ranks that share a reader read the same, and use all of it once
            near = ranks[first : first + sharing]
            used = np.concatenate([portion.index[portion.index != NOTHING] for portion in near])
            np.testing.assert_array_equal(np.sort(used), np.arange(near[0].size))
            assert all((portion.runs == near[0].runs).all() for portion in near)
        sizes = [portion.size for portion in ranks]
        assert max(sizes) - min(sizes) <= max(1, order.readers // world)  # a run of what remains is one longer at most


@given(order=orders, data=st.data())
@hundreds
def test_entering_at_any_step_gives_what_the_unbroken_sequence_gives(order, data):
    world = data.draw(st.sampled_from(worlds_of(order)))
    rank = data.draw(st.integers(0, world - 1))
    unbroken = np.concatenate([ranks[rank].rows for epoch in (0, 1) for ranks in epoch_of(order, epoch, world)])
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch - 1))
    np.testing.assert_array_equal(order.rows(step, rank, world), unbroken[step])


@given(order=orders, epoch=st.integers(0, 50))
@hundreds
def test_a_chunk_is_read_whole_but_where_blocks_meet(order, epoch):
    seen: list[int] = []
    for [block] in epoch_of(order, epoch):
        chunks = runs_of_chunks(order, block)
        assert len(set(chunks)) == len(chunks)
        seen += chunks
    assert set(seen) == set(range(-(-order.count // order.images_per_chunk)))
    assert len(seen) - len(set(seen)) <= order.blocks_per_epoch - 1


@given(order=orders, epoch=st.integers(0, 50))
@hundreds
def test_a_step_of_a_whole_block_draws_from_as_many_places_as_readers(order, epoch):
    """A reader has half a chunk at least, so a chunk is of three at most; where a batch divides the block, of one."""
    taken, room = order.batch // order.readers, BLOCK_CHUNKS * order.images_per_chunk
    for [block] in epoch_of(order, epoch):
        if block.size < order.block_images or order.batch > room:
            continue
        chunks = block.rows.reshape(len(block.rows), order.readers, taken) // order.images_per_chunk
        if room % order.batch == 0:
            readers = [set(chunks[:, v].ravel()) for v in range(order.readers)]
            assert sum(map(len, readers)) == len(set().union(*readers)) == BLOCK_CHUNKS
        for step in chunks:
            _, neighbours = np.unique(step[:, 0], return_counts=True)
            assert neighbours.max() <= (1 if room % order.batch == 0 else 3)


@given(order=orders | st.builds(Order, st.just(10**6), st.integers(1, 64), st.integers(1, 5000), st.just(0)))
@thousands
def test_no_block_is_larger_than_64_chunks_or_one_batch(order):
    assert order.block_images % order.batch == 0
    assert order.block_images <= max(64 * order.images_per_chunk, order.batch)
    assert order.portion(0).size == min(order.block_images, order.count)


@given(order=orders, step=st.integers(0, 10**9))
@thousands
def test_a_step_is_found_in_the_block_that_says_to_hold_it(order, step):
    portion = order.portion(order.block_of(step))
    assert portion.first_step <= step < portion.first_step + len(portion.index)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 3}, {"epoch": 1}])
def test_another_seed_or_epoch_is_another_order_of_chunks_and_within_them(change):
    order = Order(20_000, 64, 64, 0)
    epoch = change.pop("epoch", 0)
    ours, other = order.portion(0), replace(order, **change).portion(epoch * order.blocks_per_epoch)
    assert not np.array_equal(ours.runs, other.runs)
    assert not np.array_equal(ours.index, other.index)


def test_the_blocks_of_an_epoch_are_shuffled_differently():
    order = Order(20_000, 64, 64, 0)
    assert not np.array_equal(order.portion(0).index, order.portion(1).index)


def test_every_image_of_a_chunk_comes_first_equally_often():
    """The mean place of each of 64 images over 400 epochs: 31.5 with a standard error of 0.92."""
    order = Order(64, 64, 1, 0)
    places = np.array([np.argsort([order.rows(64 * epoch + step)[0] for step in range(64)]) for epoch in range(400)])
    assert np.abs(places.mean(axis=0) - 31.5).max() < 4.5 * 0.92


def test_ten_million_particles_need_no_permutation_of_particles():
    order = Order(10_000_000, 64, 64, 0)
    portion = order.portion(order.block_of(10**6))
    assert portion.size == order.block_images == 4096
    assert portion.runs.shape == (64, 2)


def test_a_batch_that_is_a_prime_has_one_reader_of_61_chunks_and_more():
    order = Order(100_000, 64, 67, 0)
    assert (order.readers, order.block_images) == (1, 61 * 67)
    assert len(set(order.rows(0) // 64)) > 30


@pytest.mark.parametrize(
    ("batch", "world", "works"),
    [(64, 6, 60), (64, 3, 63), (67, 2, 68), (320, 40, 160), (1, 64, 64), (192, 96, 288), (100, 128, 128)],
)
def test_ranks_that_cannot_share_a_batch_are_told_one_that_works(refusal, batch, world, works):
    order = Order(1000, 64, batch, 0)
    message = refusal(ConfigError, [f"batch = {batch}", f"{world} ranks"], lambda: order.portion(0, 0, world))
    suggested = int(message.split("a batch of ")[1].split()[0])
    replace(order, batch=suggested).portion(0, world - 1, world)
    assert suggested == works


def test_512_ranks_share_64_readers():
    order = Order(100_000, 64, 1024, 0)
    ranks = [order.portion(3, rank, 512) for rank in range(512)]
    np.testing.assert_array_equal(joined(ranks), order.portion(3).rows)
    assert {portion.size for portion in ranks} == {64}  # a chunk, which eight of them read
