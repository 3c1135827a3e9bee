"""Blocks read by a thread and by real processes: the same bits, whatever happens to the processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice

import numpy as np
import psutil
import pytest
import torch

from data_prep.convert import prepare
from spire_dist import machine
from spire_dist.data import blocks
from spire_dist.data.blocks import choose_workers, local_blocks
from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import StoreError

WORLD, FIRST = 2, 3


@pytest.fixture(scope="module", params=["float16", "compact"])
def store(request, tmp_path_factory, write_particles):
    """500 particles in chunks of 4; a block is 256 of them, so an epoch has two."""
    folder = tmp_path_factory.mktemp("blocks")
    source = write_particles(folder / "in", count=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.images_per_chunk", lambda box, itemsize: 4)
        return ParticleStore.open(prepare(source, folder / "store", images_per_shard=128, dtype=request.param))


def order_of(store: ParticleStore) -> Order:
    return Order(store.count, store.images_per_chunk, 4, 0)


def expected(store: ParticleStore, number: int) -> list[np.ndarray]:
    """The blocks as the scattered reader sees them."""
    portions = [order_of(store).portion(block, 1, WORLD) for block in range(FIRST, FIRST + number)]
    return [store.stored(np.concatenate([np.arange(a, a + n) for a, n in portion.runs])) for portion in portions]


def reading_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_are_the_images_of_their_runs(store, workers):
    with closing(local_blocks(store, workers, order_of(store), 1, WORLD, FIRST)) as found:
        for images, wanted in zip(islice(found, 5), expected(store, 5), strict=True):
            np.testing.assert_array_equal(images, wanted)
        processes = reading_processes()
        assert len(processes) == workers
    assert gone(processes)


@pytest.mark.parametrize("store", ["float16"], indirect=True)
def test_a_signal_to_the_whole_job_does_not_end_the_reading_and_a_killed_process_is_replaced(store):
    wanted = iter(expected(store, 12))
    with closing(local_blocks(store, 2, order_of(store), 1, WORLD, FIRST)) as found:
        for images in islice(found, 2):
            np.testing.assert_array_equal(images, next(wanted))
        first = reading_processes()
        for process in first:
            for number in STOP_SIGNALS:
                process.send_signal(number)
        for images in islice(found, 4):
            np.testing.assert_array_equal(images, next(wanted))
        assert reading_processes() == first
        os.kill(first[0].pid, signal.SIGKILL)
        for images in islice(found, 6):
            np.testing.assert_array_equal(images, next(wanted))
        assert set(reading_processes()).isdisjoint(first)


@pytest.mark.parametrize("store", ["float16"], indirect=True)
def test_processes_that_are_killed_again_and_again_end_in_one_line(store, refusal, monkeypatch):
    monkeypatch.setattr(blocks, "RESTARTS", 0)
    with closing(local_blocks(store, 1, order_of(store), 0, 1, 0)) as found:
        next(found)
        os.kill(reading_processes()[0].pid, signal.SIGKILL)
        refusal(StoreError, ["data.workers = 1", str(store.path), "memory"], lambda: list(islice(found, 5)))
    assert not reading_processes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_told_in_one_line_from_wherever_it_is_read(store, tmp_path, refusal, workers):
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    shard = copy / "images" / "c" / "2" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:100])
    with closing(local_blocks(ParticleStore.open(copy), workers, order_of(store), 0, 1, 0)) as found:
        refusal(StoreError, [str(shard), "damaged", "verify"], lambda: list(islice(found, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["float16"], indirect=True)
@pytest.mark.parametrize("end", ["return", "raise", "kill"])
def test_no_reading_process_outlives_its_trainer(store, end):
    """Left in the middle of training, closed by nobody."""
    code = f"""
import sys, time, psutil
from functools import partial
from spire_dist.data.blocks import local_blocks
from spire_dist.data.loader import BatchSource, Prefetcher
from spire_dist.data.store import ParticleStore
if __name__ == "__main__":
    store = ParticleStore.open({str(store.path)!r})
    source = BatchSource(store, blocks=partial(local_blocks, store, 2))
    data = Prefetcher(source.training(source.order(4, 0)))
    data.next()
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    if {end!r} == "kill":
        time.sleep(600)
    if {end!r} == "raise":
        sys.exit("the trainer failed")
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]  # type: ignore[union-attr]
    assert len(children) >= 2
    if end == "kill":
        trainer.kill()
    assert trainer.wait(60) == {"return": 0, "raise": 1, "kill": -signal.SIGKILL}[end]
    assert gone(children)


def test_too_little_shared_memory_is_told_with_what_to_do(store, refusal, monkeypatch):
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    words = ["data.workers", "shared memory", "No space left", "--shm-size"]
    refusal(StoreError, words, lambda: local_blocks(store, 1, order_of(store), 0, 1, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_block_stays_as_it_is_until_the_next_one_is_asked_for(store, workers):
    with closing(local_blocks(store, workers, order_of(store), 0, 1, 0)) as found:
        for _ in range(4):
            images = next(found)
            before = images.copy()
            time.sleep(0.3)  # the next one is being read
            np.testing.assert_array_equal(images, before)


def test_a_gpu_gets_processes_and_a_cpu_the_thread_unless_told(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert [choose_workers(None, torch.device(kind)) for kind in ("cpu", "cuda")] == [0, 2]
    assert [choose_workers(wanted, torch.device("cpu")) for wanted in (0, 5)] == [0, 5]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_workers(None, torch.device("cuda")) == 0
