"""The store reader: what zarr itself reads is the truth."""

import json
import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore, map_table
from spire_dist.errors import StoreError
from spire_dist.schema import ARRAYS, OPTIONAL_ARRAYS


@pytest.fixture(scope="module", params=["float16", "float32", "compact"])
def store(request, tmp_path_factory, write_particles):
    """150 particles in shards of 64, so the last shard and the last chunk are short."""
    folder = tmp_path_factory.mktemp("store")
    return prepare(write_particles(folder / "in"), folder / "store", images_per_shard=64, dtype=request.param)


@given(rows=st.lists(st.integers(0, 149), max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_order_are_what_zarr_reads(store, rows):
    particles, group, rows = ParticleStore.open(store), zarr.open_group(store, mode="r"), np.array(rows, dtype=int)
    expected = group["images"][...][rows]
    np.testing.assert_array_equal(particles.stored(rows), expected)
    assert particles.stored(rows).dtype == expected.dtype == particles.image_dtype
    expected = expected.astype(np.float32)
    if "scale" in group:
        expected *= group["scale"][...][rows, None, None]
    images = particles.read(rows)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, expected)


def test_runs_across_chunks_and_shards_are_what_zarr_reads(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=300)
    particles = ParticleStore.open(prepare(source, tmp_path / "store", images_per_shard=128))
    expected = zarr.open_group(particles.path, mode="r")["images"][...].astype(np.float32)
    for rows in (np.arange(300), np.arange(300)[::-1], np.arange(60, 260), np.array([127, 128, 127, 63, 64, 299])):
        np.testing.assert_array_equal(particles.read(rows), expected[rows])


def test_tables_are_what_zarr_reads_and_source_index_is_a_permutation(store):
    particles, group = ParticleStore.open(store), zarr.open_group(store, mode="r")
    for name in (name for name in (*ARRAYS, *OPTIONAL_ARRAYS) if name != "images"):
        found = getattr(particles, name)
        if name in group:
            np.testing.assert_array_equal(found, group[name][...])
            assert found.dtype == group[name].dtype
        else:
            assert found is None
    assert sorted(particles.source_index) == list(range(150))
    assert (particles.count, len(particles), particles.box, particles.pixel_size) == (150, 150, 16, 2.0)
    assert particles.label is None
    assert particles.has_poses


@pytest.mark.parametrize("rows", [[150], [-1], [0, 1000]])
def test_rows_that_do_not_exist_are_an_index_error(store, rows):
    with pytest.raises(IndexError, match="150 particles"):
        ParticleStore.open(store).read(rows)


def test_an_unfinished_store_is_refused_and_says_how_to_finish(tmp_path, write_particles, refusal):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store")
    (store / "manifest.json").unlink()
    refusal(StoreError, [str(store), "unfinished", "same `spire-dist prep`"], lambda: ParticleStore.open(store))


def test_a_folder_that_is_no_store_is_refused(tmp_path, refusal):
    for path in (tmp_path, tmp_path / "absent"):
        refusal(StoreError, [str(path), "not a particle store"], lambda path=path: ParticleStore.open(path))


def test_a_store_of_another_version_is_refused(tmp_path, write_particles, refusal):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    refusal(StoreError, [str(store), "version 99"], lambda: ParticleStore.open(store))
    (store / "manifest.json").write_text("{")
    refusal(StoreError, ["manifest.json", "damaged"], lambda: ParticleStore.open(store))


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff\xfe", b"1"])
def test_a_manifest_that_is_none_is_refused(tmp_path, write_particles, refusal, content):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store")
    (store / "manifest.json").write_bytes(content)
    refusal(StoreError, ["manifest.json", "damaged"], lambda: ParticleStore.open(store))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_named_when_it_is_read(tmp_path, write_particles, refusal, damage):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store", images_per_shard=64)
    particles = ParticleStore.open(store)
    shard = store / "images/c/1/0/0"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        shard.unlink()
    particles.read([0, 149])  # the other shards are untouched
    refusal(StoreError, [str(shard), "verify"], lambda: particles.read([0, 70]))


@pytest.mark.parametrize(
    "modules", [("torch", "data_prep.convert", "data_prep.checks"), ("zarr", "spire_dist.data.store")]
)
def test_writing_stores_needs_no_torch_and_reading_them_no_zarr(modules):
    forbidden, *wanted = modules
    code = f"import sys, {', '.join(wanted)}; sys.exit(bool({{'torch', 'ray', '{forbidden}'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tables_are_views_of_their_files_that_cannot_be_written(store):
    particles = ParticleStore.open(store)
    for name in ("rotations", "shifts", "ctf", "source_index"):
        table = getattr(particles, name)
        assert isinstance(table.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


def test_a_table_of_several_or_compressed_chunks_is_refused(tmp_path):
    group = zarr.create_group(tmp_path)
    group.create_array("a", data=np.arange(10), chunks=(5,), compressors=None)
    group.create_array("b", data=np.arange(10), chunks=(10,))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name} is not one uncompressed chunk"):
            map_table(tmp_path, name)


def test_a_table_of_nothing_but_zeros_is_what_zarr_reads(tmp_path):
    group = zarr.create_group(tmp_path)
    group.create_array("zeros", data=np.zeros((10, 2), np.int32), chunks=(10, 2), compressors=None)
    assert not (tmp_path / "zeros" / "c").exists()
    np.testing.assert_array_equal(map_table(tmp_path, "zeros"), group["zeros"][...])
