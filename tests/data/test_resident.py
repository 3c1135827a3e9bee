"""Whether the images are kept in memory: by what is free, and with the bits of the store."""

from itertools import islice

import numpy as np
import psutil
import pytest
import torch

from data_prep.convert import prepare
from spire_dist.data import resident
from spire_dist.data.loader import BatchSource
from spire_dist.data.resident import SHARE, free_memory, resident_images
from spire_dist.data.store import ParticleStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float16", "float32", "compact"])
def store(request, tmp_path_factory, write_particles):
    folder = tmp_path_factory.mktemp("resident")
    source = write_particles(folder / "in")
    return ParticleStore.open(prepare(source, folder / "store", images_per_shard=64, dtype=request.param))


def test_all_images_are_kept_as_they_are_stored(store, monkeypatch):
    monkeypatch.setattr(resident, "PIECE_BYTES", 10_000)  # several pieces
    images = resident_images(store, "always", CPU)
    assert isinstance(images, np.ndarray)
    np.testing.assert_array_equal(images, store.stored(np.arange(150)))
    assert images.dtype == store.image_dtype


def test_batches_have_the_same_bits_from_memory_and_from_disk(store):
    sources = [BatchSource(store, images) for images in (None, resident_images(store, "always", CPU))]
    order = sources[0].order(16, 1)
    streamed, kept = (islice(source.training(order, 3), 2 * order.steps_per_epoch) for source in sources)
    for found, expected in zip(streamed, kept, strict=True):
        assert torch.equal(found.images, expected.images)
        whole = torch.fft.rfft2(torch.from_numpy(store.read(found.rows.numpy())))
        assert torch.equal(found.images, whole)


def test_the_set_is_kept_where_it_takes_little_of_what_a_rank_may_have(store, monkeypatch):
    size = 150 * 16 * 16 * store.images.dtype.itemsize
    for ranks in (1, 8):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        for free, kept in ((size * ranks / SHARE, True), (size * ranks / SHARE - 1, False)):
            monkeypatch.setattr(resident, "free_memory", lambda free=free: free)
            assert (resident_images(store, "auto", CPU) is not None) is kept
    assert resident_images(store, "always", CPU) is not None
    monkeypatch.setattr(resident, "free_memory", lambda: 2**60)
    assert resident_images(store, "never", CPU) is None


def test_free_memory_is_not_more_than_the_machine_has():
    assert 0 < free_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize("v2", [False, True])
def test_the_limit_of_a_control_group_counts_without_files_that_are_only_cached(tmp_path, v2):
    names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    assert resident._left_in_group(tmp_path, v2) is None  # no such files
    for name, value in zip(names, ("1000", "700"), strict=True):
        (tmp_path / name).write_text(value + "\n")
    key = "inactive_file" if v2 else "total_inactive_file"
    (tmp_path / "memory.stat").write_text(f"anon 1\n{key} 200\nfile 3\n")
    assert resident._left_in_group(tmp_path, v2) == 500
    if v2:
        (tmp_path / "memory.max").write_text("max\n")
        assert resident._left_in_group(tmp_path, v2) is None


def test_the_groups_of_this_process_are_asked_up_to_the_root(tmp_path, monkeypatch):
    asked = []

    def left(folder, v2):
        asked.append((str(folder), v2))
        return 12_345 if str(folder).endswith("memory/job") else None

    monkeypatch.setattr(resident, "_left_in_group", left)
    monkeypatch.setattr(resident.Path, "read_text", lambda self: "4:memory:/job/step\n3:cpu:/job\n0::/unified\n")
    assert free_memory() == 12_345
    assert ("/sys/fs/cgroup/memory/job/step", False) in asked
    assert ("/sys/fs/cgroup/unified", True) in asked
    assert not any("cpu" in folder for folder, _ in asked)
