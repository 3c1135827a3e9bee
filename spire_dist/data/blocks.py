"""Blocks of images read ahead of training, by a thread of this process or by processes of their own.

A source of blocks is a function (`Blocks`), so that another one may take its place: it is told the order, which rank of
how many this is, and the first block, and yields, without end, the images of that block and of those that follow it,
[n, D, D] as they are stored, in the sequence that `Order.portion(block, rank, world).runs` says. What they are for is the
business of `spire_dist.data.loader`, which calls it, uses each block until it asks for the next one, and closes it at the end.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import StoreError
from spire_dist.machine import own_cores

Blocks = Callable[[Order, int, int, int], Generator[NDArray[Any]]]
"""(order, rank, world, first block) -> images of that block, of the next one, ..."""

AHEAD_BYTES = 2**30
"""Of blocks read before they are needed; at least one block is, which is 64 chunks or one batch."""
GPU_WORKERS = 2
RESTARTS = 3
"""So often in a row a reading process may die before its first block."""


def local_blocks(
    store: ParticleStore, workers: int, order: Order, rank: int, world: int, first: int
) -> Generator[NDArray[Any]]:
    """Blocks of a store read ahead by `workers` processes, or by a thread of this one where that is 0.

    Raises StoreError for a shard that cannot be read, and where reading processes are killed again and again.
    """
    shape = min(order.block_images // world, order.count), store.box, store.box
    kind = torch.from_numpy(np.empty(0, store.images.dtype)).dtype
    if workers == 0:
        return _by_thread(Reader(store.path, order, rank, world, torch.empty((2, *shape), dtype=kind)), first)
    block_bytes = int(np.prod(shape)) * kind.itemsize
    workers = min(workers, max(1, AHEAD_BYTES // block_bytes))
    slots = _shared((workers + 1, *shape), kind)
    return _by_processes(Reader(store.path, order, rank, world, slots), workers, first)


def choose_workers(wanted: int | None, device: torch.device) -> int:
    """Reading processes per rank: as wanted, else as the device needs.

    A thread feeds a CPU, whose steps are long and made by code that lets it run. The steps of a GPU are short, and Python,
    which starts its kernels, must not be kept waiting by a thread that reads.
    """
    if wanted is not None:
        return wanted
    return max(0, min(GPU_WORKERS, own_cores() - 1)) if device.type == "cuda" else 0


@dataclass(eq=False)
class Reader(Dataset[int | StoreError]):
    """What a reading process is given: a name, numbers and the places in memory that blocks are read into, in turn.

    There is one place more than blocks are read ahead, so none is filled again while its block is used. The process opens
    the store itself.
    """

    path: Path
    order: Order
    rank: int
    world: int
    slots: Tensor

    @cached_property
    def store(self) -> ParticleStore:
        """Opened where it is first asked for."""
        return ParticleStore.open(self.path)

    def __getitem__(self, block: int) -> int | StoreError:
        """Read a block; returns its images' number. An error is handed over like it, so that it stays one line."""
        try:
            runs = self.order.portion(block, self.rank, self.world).runs
            self.store.images.announce(runs)
            return len(self.store.images.read(runs, self.slots[block % len(self.slots)].numpy()))
        except StoreError as error:
            return error

    def images(self, block: int, found: int | StoreError) -> NDArray[Any]:
        """The images of a block that was read; raises what went wrong."""
        if isinstance(found, StoreError):
            raise found
        return self.slots[block % len(self.slots), :found].numpy()


def _by_thread(reader: Reader, first: int) -> Generator[NDArray[Any]]:
    with ThreadPoolExecutor(1, thread_name_prefix="blocks") as pool:
        ahead = pool.submit(reader.__getitem__, first)
        for block in count(first):
            found, ahead = ahead.result(), pool.submit(reader.__getitem__, block + 1)
            yield reader.images(block, found)


def _by_processes(reader: Reader, workers: int, first: int) -> Generator[NDArray[Any]]:
    """A block is known by its number alone, so one that a dead process owed is read again by the next."""
    deaths = 0
    while True:
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=count(first),
            num_workers=workers,
            prefetch_factor=1,  # a block per process is on its way while one is used
            multiprocessing_context="spawn",
            worker_init_fn=_serve_the_trainer,
        )
        try:
            for found in loader:
                block, first, deaths = first, first + 1, 0
                yield reader.images(block, found)
        except (RuntimeError, OSError, EOFError) as error:  # of the DataLoader, by where the process died
            if str(error).startswith("Caught"):  # raised in a process that lives: a bug
                raise
            deaths += 1
            if deaths > RESTARTS:
                raise StoreError(
                    f"data.workers = {workers}: processes that read {reader.path} were killed {deaths} times; give the job "
                    "more memory, or set data.workers = 0"
                ) from error


def _serve_the_trainer(worker: int) -> None:
    """A signal to the whole job is for the trainer, which needs blocks until it has saved; when it is gone, so is this."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The DataLoader looks whether its parent changes, which it does not for one that had died before.
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _shared(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=kind).share_memory_()
    except (RuntimeError, OSError) as error:
        mib = int(np.prod(shape)) * kind.itemsize / 2**20
        raise StoreError(
            f"data.workers: no {mib:.0f} MiB of shared memory ({str(error).splitlines()[0]}); give the container more "
            "(--shm-size), or set data.workers = 0"
        ) from error
