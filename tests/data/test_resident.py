"""Whether the images are kept in memory: by what is free, and with the bits of the store."""

import os
import subprocess
import sys
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


def test_the_set_is_kept_by_a_rank_alone_on_its_node_where_it_takes_little_of_what_is_free(store, monkeypatch):
    size = 150 * 16 * 16 * store.images.dtype.itemsize
    for free, kept in ((size / SHARE, True), (size / SHARE - 1, False)):
        monkeypatch.setattr(resident, "free_memory", lambda free=free: free)
        assert (resident_images(store, "auto", CPU) is not None) is kept
    assert resident_images(store, "always", CPU) is not None
    monkeypatch.setattr(resident, "free_memory", lambda: 2**60)
    assert resident_images(store, "never", CPU) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resident_images(store, "auto", CPU) is None
    assert resident_images(store, "always", CPU) is not None


RANK = """
import sys
from itertools import islice
import numpy as np, psutil, torch
from spire_dist.data.loader import BatchSource
from spire_dist.data.resident import resident_images
from spire_dist.data.store import ParticleStore
store, wanted, rank, device = ParticleStore.open(sys.argv[1]), sys.argv[2], int(sys.argv[3]), torch.device("cpu")
order = BatchSource(store).order(16, 0)
list(islice(BatchSource(store).training(order, 0, rank, 2), 40))  # what reading takes by itself
before = psutil.Process().memory_full_info().uss
source = BatchSource(store, resident_images(store, wanted, device))
for batch in islice(source.training(order, 0, rank, 2), order.steps_per_epoch):
    pass
print(psutil.Process().memory_full_info().uss - before)
"""


@pytest.mark.slow
def test_ranks_of_a_node_keep_no_copies_of_their_own_unless_told(tmp_path, write_particles, monkeypatch):
    """2,000 images of 64 px, 31 MiB, in blocks of 2 MiB a rank; memory that is no other process's, after an epoch."""
    monkeypatch.setattr("data_prep.plan.images_per_chunk", lambda box, itemsize: 4)
    source = write_particles(tmp_path / "in", count=2000, box=64, per_stack=500)
    store = prepare(source, tmp_path / "store", images_per_shard=512, dtype="float32", workers=1)
    environment, size = os.environ | {"LOCAL_WORLD_SIZE": "2"}, 2000 * 64 * 64 * 4
    for wanted, copied in (("auto", False), ("always", True)):
        commands = [[sys.executable, "-c", RANK, store, wanted, str(rank)] for rank in range(2)]
        ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
        grown = [int(rank.communicate(timeout=120)[0]) for rank in ranks]
        assert min(grown) > 0.9 * size if copied else max(grown) < 0.4 * size


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
