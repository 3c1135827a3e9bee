"""Images read out of shards by hand: what zarr itself reads is the truth."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_dist.data.shards import Shards
from spire_dist.errors import StoreError

COUNT, BOX, CHUNK, SHARD = 150, 6, 16, 64
"""Three shards, the last of them short, and its last chunk too."""


def write_images(folder, dtype: str, compressed: bool, **options) -> np.ndarray:
    """Noise with an empty second chunk, which zarr leaves out."""
    images = (20 * np.random.default_rng(0).standard_normal((COUNT, BOX, BOX))).astype(dtype)
    images[CHUNK : 2 * CHUNK] = 0
    about = {"chunks": (CHUNK, BOX, BOX), "shards": (SHARD, BOX, BOX), "filters": None, "fill_value": 0} | options
    array = zarr.create_array(
        folder, shape=images.shape, dtype=dtype, compressors=zarr.codecs.ZstdCodec() if compressed else None, **about
    )
    array[...] = images
    return images


@pytest.fixture(scope="module", params=[("float16", False), ("float32", False), ("int8", True), ("float16", True)])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "images"
    write_images(folder, *request.param)
    return folder


def within_chunks(first: int, count: int) -> tuple[int, int]:
    """A run that ends with its chunk, or with the images."""
    return first, min(count, CHUNK - first % CHUNK, COUNT - first)


runs = st.lists(st.builds(within_chunks, st.integers(0, COUNT - 1), st.integers(1, CHUNK)), max_size=12)


@given(runs=runs)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_runs_in_any_order_are_what_zarr_reads(folder, runs):
    expected = zarr.open_array(folder, mode="r")[...]
    found = Shards.open(folder).read(runs)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, np.concatenate([expected[:0], *(expected[f : f + n] for f, n in runs)]))


def test_every_chunk_is_read_into_the_array_that_is_given(folder):
    expected, shards = zarr.open_array(folder, mode="r")[...], Shards.open(folder)
    out = np.full((COUNT + 5, BOX, BOX), 99, dtype=expected.dtype)
    found = shards.read([within_chunks(first, CHUNK) for first in range(0, COUNT, CHUNK)], out)
    assert np.shares_memory(found, out)
    np.testing.assert_array_equal(out[:COUNT], expected)
    assert (out[COUNT:] == 99).all()


def test_an_index_is_checked_once_and_every_damaged_byte_of_it_is_found(tmp_path, refusal):
    write_images(tmp_path / "images", "float16", False)
    shards = Shards.open(tmp_path / "images")
    path = shards.path(0)
    raw = path.read_bytes()
    for byte in range(len(raw) - 16 * (SHARD // CHUNK) - 4, len(raw)):
        path.write_bytes(raw[:byte] + bytes([raw[byte] ^ 1]) + raw[byte + 1 :])
        refusal(StoreError, [str(path), "index", "verify"], lambda: shards.read([(0, 1)]))
    path.write_bytes(raw)
    first = shards.read([(0, 1)])
    path.write_bytes(raw[:-1] + b"x")
    np.testing.assert_array_equal(shards.read([(0, 1)]), first)


@pytest.mark.parametrize(
    ("damage", "compressed"),
    [
        *((d, c) for d in ("gone", "empty", "cut") for c in (False, True)),
        ("bytes", True),
    ],  # other pixels only a hash tells
)
def test_a_damaged_shard_is_named(tmp_path, refusal, damage, compressed):
    write_images(tmp_path / "images", "int8", compressed)
    shards = Shards.open(tmp_path / "images")
    shards.read([(64, 1)])  # its index is known
    path = shards.path(1)
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": raw[:100], "bytes": b"x" * 100 + raw[100:]}[damage])
    shards.read([(0, 16), (130, 14)])  # the other shards are untouched
    refusal(StoreError, [str(path), "damaged", "verify"], lambda: shards.read([(0, 16), (64, 16)]))


@pytest.mark.parametrize("options", [{"shards": None}, {"compressors": zarr.codecs.GzipCodec()}])
def test_an_array_that_prep_does_not_write_is_refused_when_opened(tmp_path, options):
    about = {"chunks": (CHUNK, BOX, BOX), "shards": (SHARD, BOX, BOX), "compressors": None} | options
    zarr.create_array(tmp_path / "images", shape=(COUNT, BOX, BOX), dtype="int8", **about)
    with pytest.raises((ValueError, KeyError)):
        Shards.open(tmp_path / "images")


def test_an_index_at_the_start_is_refused_when_opened(tmp_path):
    write_images(tmp_path / "images", "int8", False)
    path = tmp_path / "images" / "zarr.json"
    about = json.loads(path.read_text())
    about["codecs"][0]["configuration"]["index_location"] = "start"
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="start"):
        Shards.open(tmp_path / "images")
