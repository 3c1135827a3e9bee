"""Batches ready to train on: images and CTFs as transforms, made ahead of the trainer in a thread.

Images come from memory (`resident.py`) or block by block from the store (`blocks.py`), in the sequence of `order.py`; what a
batch holds does not depend on which. Called by training, by the consensus map and by benchmarks.
"""

import atexit
import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.data.blocks import Blocks, local_blocks
from spire_dist.data.order import NOTHING, Order
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError
from spire_dist.physics.ctf import contrast_transfer, frequency_grid

Item = TypeVar("Item")
READ_AHEAD = 2
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Batch:
    """B particles: rows in the store [B]; transforms of the images and their CTFs [B, D, D // 2 + 1]; poses."""

    rows: Tensor
    images: Tensor
    ctf: Tensor
    rotations: Tensor
    shifts_px: Tensor
    total: int
    """Particles in the whole step, of all ranks: what a sum over them is divided by."""


@dataclass(frozen=True, slots=True)
class Particles:
    """The same before they are transformed: rows [B], pixels [B, D, D] as float32."""

    rows: NDArray[np.int64]
    pixels: Tensor
    total: int


class BatchSource:
    """Turns particles of a store into batches. `resident` are all its images as stored, where they are in memory."""

    def __init__(
        self,
        store: ParticleStore,
        resident: NDArray[Any] | Tensor | None = None,
        device: torch.device = CPU,
        blocks: Blocks | None = None,
    ) -> None:
        self.store = store
        self.resident = resident
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self._blocks = blocks or partial(local_blocks, store, 0)

    def order(self, batch: int, seed: int) -> Order:
        """The order of training in batches of so many images, of all ranks together."""
        return Order(self.store.count, self.store.images_per_chunk, batch, seed)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The particles `rows` [B] in that order, on the CPU. Raises StoreError for pixels that are not finite."""
        images = self.resident[rows] if isinstance(self.resident, np.ndarray) else self.store.stored(rows)
        return self._batch(Particles(rows, self._pixels(torch.from_numpy(images), rows, CPU), len(rows)))

    def sequence(self, batch: int) -> Generator[Batch]:
        """All particles once, in store order, on the CPU."""
        for start in range(0, self.store.count, batch):
            yield self.batch(np.arange(start, min(start + batch, self.store.count)))

    def training(self, order: Order, first_step: int = 0, rank: int = 0, world: int = 1) -> Generator[Batch]:
        """A rank's share of step `first_step`, of the next one, ... without end, on the device.

        A short step has fewer particles, perhaps none for a rank. Raises StoreError for pixels that are not finite.
        """
        with closing(self.particles(order, first_step, rank, world)) as steps:
            yield from map(self._batch, steps)

    def particles(self, order: Order, first_step: int = 0, rank: int = 0, world: int = 1) -> Generator[Particles]:
        """The same before it is transformed."""
        first = order.block_of(first_step)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        streamed = nullcontext() if self.resident is not None else closing(self._blocks(order, rank, world, first))
        with streamed as blocks:
            for block in count(first):
                portion = order.portion(block, rank, world)
                images, places = (self.resident, portion.rows) if blocks is None else (next(blocks), portion.index)
                assert images is not None
                for step in range(max(0, first_step - portion.first_step), len(portion.index)):
                    real = portion.index[step] != NOTHING
                    rows, taken = portion.rows[step][real], _taken(images, places[step][real])
                    yield Particles(rows, self._pixels(taken, rows, self.device), int(portion.totals[step]))

    def _pixels(self, images: Tensor, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Images [B, D, D] as stored, as float32 on the device; those of a GPU were looked at when they were put there."""
        pixels, store = images.float(), self.store
        if images.device.type == "cpu":
            refuse_not_finite(store, pixels, rows)
            pixels = pixels if device.type == "cpu" else _moved(images, device).float()  # half the bytes on their way
        return pixels if store.scale is None else pixels * _moved(store.scale[rows], device)[:, None, None]

    def _batch(self, particles: Particles) -> Batch:
        """Transformed by the device that holds the pixels."""
        store, rows, pixels = self.store, particles.rows, particles.pixels
        device = pixels.device
        grid = _grid(store.box, store.pixel_size, device)
        return Batch(
            rows=_moved(rows, device),
            images=torch.fft.rfft2(pixels) if len(rows) else pixels[..., : len(grid[0][0])] + 0j,
            ctf=contrast_transfer(_moved(store.ctf[rows], device), *grid),
            rotations=_moved(store.rotations[rows], device),
            shifts_px=_moved(store.shifts[rows], device) / store.pixel_size,
            total=particles.total,
        )


def refuse_not_finite(store: ParticleStore, images: Tensor, rows: NDArray[np.int64]) -> None:
    """Raise StoreError, naming their files and rows, where images [B, D, D] before their scale are not finite."""
    sums = torch.from_numpy(store.scale[rows]) if store.scale is not None else images.sum((1, 2), dtype=torch.float32)
    finite = torch.isfinite(sums).numpy()
    if not finite.all():
        sources = store.sources
        bad = [f"{sources[store.source[row]]} row {store.source_index[row] + 1}" for row in rows[~finite][:8]]
        raise StoreError(
            f"{store.path}: pixels that are not finite numbers in the image of {', '.join(bad)}; "
            "`spire-dist verify` checks the store, prep makes it again"
        )


class Prefetcher(Generic[Item]):
    """Batches made ahead in a thread; `waited_s` is the time the trainer stood waiting for data."""

    def __init__(self, batches: Generator[Item]) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(maxsize=READ_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True)
        self._thread.start()
        # Python, when it leaves, waits for processes that ignore the signal to end: those that read must be told before.
        atexit.register(self.close)

    def _fill(self, batches: Generator[Item]) -> None:
        with closing(batches):
            while not self._closed.is_set():
                try:
                    item: Item | BaseException = next(batches)
                except BaseException as error:  # handed to the trainer, which raises it
                    item = error
                while not self._closed.is_set():
                    try:
                        self._queue.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return

    def next(self) -> Item:
        """The next batch; raises what went wrong while reading it."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the reading thread, and the processes it started."""
        self._closed.set()
        self._thread.join()
        atexit.unregister(self.close)


def _taken(images: NDArray[Any] | Tensor, places: NDArray[np.int64]) -> Tensor:
    """Some of the images, where they are; numpy copies them five times as fast as torch where they are float16."""
    if isinstance(images, Tensor):
        return images[torch.from_numpy(places).to(images.device)]
    return torch.from_numpy(images.take(places, axis=0))


def _moved(array: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=2)
def _grid(box: int, pixel_size: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return frequency_grid(box, pixel_size, device)
