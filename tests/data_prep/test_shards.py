"""Shards: zarr writes the same bytes, each image is read once and in file order, and what is random is random."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_prep import recipe as recipe_module
from data_prep.convert import prepare
from data_prep.plan import mixed_order
from data_prep.recipe import batches_in_file_order
from data_prep.shards import missing_shards, read_attributes, read_recipe, shard_name, shard_rows, write_shard
from data_prep.stacks import Stack, read_slices


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [128, 150, 200])
def test_a_shard_has_the_bytes_that_zarr_writes(tmp_path, write_particles, dtype, count):
    store = prepare(
        write_particles(tmp_path / "in", count=count), tmp_path / "store", images_per_shard=128, dtype=dtype
    )
    array = zarr.open_array(store / "images", mode="r")
    with zarr.config.set({"array.write_empty_chunks": True}):
        copy = zarr.create_array(
            tmp_path / "zarr", shape=array.shape, dtype=array.dtype, chunks=array.chunks, shards=array.shards,
            compressors=None, filters=None, fill_value=0,
        )  # fmt: skip
        copy[...] = array[...]
    for shard in range(-(-count // 128)):
        assert (tmp_path / "zarr/c" / str(shard) / "0/0").read_bytes() == (store / shard_name(shard)).read_bytes()


def test_any_process_makes_the_same_shard_from_the_store_alone(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=200)
    store = prepare(source, tmp_path / "store", images_per_shard=64, box=12)
    expected = {shard: (store / shard_name(shard)).read_bytes() for shard in range(4)}
    source.unlink()
    (store / "manifest.json").unlink()
    shutil.rmtree(store / "images/c")
    assert missing_shards(store) == [0, 1, 2, 3]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(write_shard, [(store, shard) for shard in (3, 1, 0, 2)])
    assert missing_shards(store) == []
    assert {shard: (store / shard_name(shard)).read_bytes() for shard in range(4)} == expected


def test_every_image_is_read_once_and_in_the_order_of_its_file(tmp_path, write_particles, monkeypatch):
    store = prepare(write_particles(tmp_path / "in", count=500, per_stack=130), tmp_path / "whole", images_per_shard=64)
    (store / "manifest.json").unlink()
    shutil.rmtree(store / "images/c")
    reads: list[tuple[str, list[int]]] = []

    def watched(stack: Stack, slices: np.ndarray) -> np.ndarray:
        reads.append((stack.path.name, slices.tolist()))
        return read_slices(stack, slices)

    monkeypatch.setattr(recipe_module, "read_slices", watched)
    for shard in missing_shards(store):
        reads.append(("", []))
        write_shard(store, shard)
    images = [(name, i) for name, slices in reads for i in slices]
    assert len(images) == len(set(images)) == 500
    begins = [i for i, (name, _) in enumerate(reads) if not name]
    for first, last in zip(begins, [*begins[1:], len(reads)], strict=True):
        within = [(name, i) for name, slices in reads[first:last] for i in slices]
        assert within == sorted(within)


@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    per_shard=st.sampled_from([64, 128, 256, 4096]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_the_mixed_order_holds_every_image_once_and_few_files_per_shard(counts, per_shard, seed):
    stack = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    slices = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
    shuffled = np.random.default_rng(seed).permutation(len(stack))  # a particle file in any order
    order = mixed_order(stack[shuffled], slices[shuffled], per_shard, seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(stack)))
    np.testing.assert_array_equal(order, mixed_order(stack[shuffled], slices[shuffled], per_shard, seed))
    longest = max(per_shard // 32, 1)
    for first in range(0, len(order), per_shard):
        rows = shuffled[order[first : first + per_shard]]
        places = np.unique(stack[rows] * 1000 + slices[rows] // longest)
        assert len(places) <= -(-len(rows) // longest) + len(rows) / min(longest, min(counts)) + 2


def test_chunks_of_a_sorted_stack_are_samples_of_the_whole_set():
    """One stack of 50 states in order, as simulations write it: states are as frequent in a chunk as chance has it."""
    count, states = 100_000, 50
    state = np.arange(count) * states // count
    order = mixed_order(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), 4096, 0)
    sampled = state[order].reshape(-1, 32)[:3072]
    # Over chunks, a state's count is at most as uneven as if whole runs of 128 had been dealt to shards of 32 runs.
    per_shard = np.array([np.bincount(shard.ravel(), minlength=states) for shard in np.split(sampled, 24)])
    assert (per_shard > 0).mean() > 0.4
    # Within a shard, place says nothing about the state.
    for shard in np.split(sampled, 24):
        first, second = (np.bincount(half.ravel(), minlength=states) for half in np.split(shard, 2))
        seen = first + second > 0
        assert stats.chi2_contingency([first[seen], second[seen]]).pvalue > 1e-5


def test_a_large_box_has_smaller_chunks(tmp_path, write_particles):
    store = prepare(write_particles(tmp_path / "in", count=40, box=160), tmp_path / "store")
    array = zarr.open_array(store / "images", mode="r")
    assert array.chunks == (32, 160, 160)
    assert read_attributes(store)["images_per_chunk"] == 32


# --- compact stores --------------------------------------------------------------------------------------------------


def test_compact_images_are_the_exact_ones_within_half_a_step(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=150)
    exact = zarr.open_group(prepare(source, tmp_path / "exact", dtype="float32"), mode="r")
    compact = zarr.open_group(prepare(source, tmp_path / "compact", dtype="compact", images_per_shard=64), mode="r")
    # The order depends on the shards' size, the images do not.
    back, order = np.argsort(compact["source_index"][...]), np.argsort(exact["source_index"][...])
    scale = compact["scale"][...][back, None, None]
    images, expected = compact["images"][...][back], exact["images"][...][order]
    assert images.dtype == np.int8
    assert (np.abs(images * scale - expected) <= 0.5001 * scale).all()
    assert np.median(scale) == 1 / 16  # of the background


def _with_pixel(source, value):
    """Image 4 of `source` with this value in its centre."""
    pixels = np.memmap(source.parent / "stacks/part00.mrcs", np.float32, "r+", 1024).reshape(-1, 16, 16)
    pixels[3, 8, 8] = value
    pixels.flush()
    return source


@pytest.mark.parametrize(("value", "step"), [(5.0, 1 / 16), (20.0, None), (2000.0, 1 / 4), (-2000.0, 1 / 4)])
def test_a_hot_pixel_does_not_cost_the_image_it_lies_in(tmp_path, write_particles, value, step):
    source = _with_pixel(write_particles(tmp_path / "in", count=70, contrast=0.5), value)
    compact, exact = (
        zarr.open_group(prepare(source, tmp_path / dtype, dtype=dtype, sign="+", shuffle=False), mode="r")
        for dtype in ("compact", "float32")
    )
    images, scale, expected = compact["images"][...], compact["scale"][...], exact["images"][...]
    largest = np.abs(expected).max(axis=(1, 2))
    if step is None:
        assert 1 / 16 < scale[3] < 1 / 4
        step = largest[3] / 127
    assert scale[3] == pytest.approx(step, rel=1e-6)
    others = np.arange(70) != 3
    assert (scale[others & (largest < 7.9)] == 1 / 16).all()
    clipped = np.clip(expected, -31.75, 31.75)
    assert (np.abs(images * scale[:, None, None] - clipped) <= 0.5001 * scale[:, None, None]).all()
    assert np.median(scale) == 1 / 16


def test_nothing_is_clipped_in_images_that_are_not_normalised(tmp_path, write_particles):
    source = _with_pixel(write_particles(tmp_path / "in", count=70), 2000.0)
    options = {"dtype": "compact", "sign": "+", "shuffle": False, "normalise": False}
    store = zarr.open_group(prepare(source, tmp_path / "store", **options), mode="r")
    assert store["images"][3].max() * store["scale"][3] == pytest.approx(2000, rel=1e-5)


def test_a_compact_store_that_was_cut_off_ends_in_the_same_bytes(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=200)
    expected = prepare(source, tmp_path / "whole", dtype="compact", images_per_shard=64)
    store = tmp_path / "store"
    shutil.copytree(expected, store)
    (store / "manifest.json").unlink()
    shutil.rmtree(store / "scale")
    (store / shard_name(1)).unlink()
    prepare(source, store, dtype="compact", images_per_shard=64)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (store, expected)]
    assert manifests[0] == manifests[1]


def test_batches_of_a_shard_do_not_span_files(tmp_path, write_particles):
    store = prepare(write_particles(tmp_path / "in", count=150, per_stack=40), tmp_path / "store")
    attributes = read_attributes(store)
    recipe = read_recipe(store, attributes, shard_rows(attributes, 0))
    batches = batches_in_file_order(recipe, np.arange(150))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(150))
    assert [len(np.unique(recipe.stack[batch])) for batch in batches] == [1] * len(batches)
