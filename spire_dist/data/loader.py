"""Batches ready to train on: images and CTFs as transforms, made one step ahead of the trainer in a thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.data.order import batches
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError
from spire_dist.physics.ctf import contrast_transfer, frequency_grid

READ_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """B particles: rows in the store [B]; transforms of the images and their CTFs [B, D, D // 2 + 1]; poses."""

    rows: Tensor
    images: Tensor
    ctf: Tensor
    rotations: Tensor
    shifts_px: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = (
            t.to(device, non_blocking=True) for t in (self.rows, self.images, self.ctf, self.rotations, self.shifts_px)
        )
        return Batch(*moved)


class BatchSource:
    """Turns rows of a store into batches; keeps the images in memory when they take less than `resident_gib`."""

    def __init__(self, store: ParticleStore, resident_gib: float) -> None:
        self.store = store
        self.rotations = torch.from_numpy(store.rotations)
        self.shifts_px = torch.from_numpy(store.shifts) / store.pixel_size
        self.ctf_parameters = torch.from_numpy(store.ctf)
        self.grid = frequency_grid(store.box, store.pixel_size)
        self.resident: Tensor | None = None
        if store.count * store.box**2 * 4 <= resident_gib * 2**30:
            self.resident = torch.from_numpy(store.read(np.arange(store.count)))

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The particles `rows` [B], in that order. Raises StoreError for an image with pixels that are not finite."""
        index = torch.from_numpy(rows)
        images = self.resident[index] if self.resident is not None else torch.from_numpy(self.store.read(rows))
        transforms = torch.fft.rfft2(images)
        finite = torch.isfinite(transforms[:, 0, 0].real)  # the sum of an image's pixels
        if not finite.all():
            bad = (self.store.source_index[rows[~finite.numpy()]] + 1).tolist()
            raise StoreError(
                f"{self.store.path}: pixels that are not finite numbers in the image of row {', '.join(map(str, bad[:8]))} "
                "of the input; `spire-dist verify` checks the store, prep makes it again"
            )
        ctf = contrast_transfer(self.ctf_parameters[index], *self.grid)
        return Batch(index, transforms, ctf, self.rotations[index], self.shifts_px[index])

    def sequence(self, batch: int) -> Iterator[Batch]:
        """All particles once, in store order."""
        for start in range(0, self.store.count, batch):
            yield self.batch(np.arange(start, min(start + batch, self.store.count)))


class Prefetcher:
    """Endless training batches from `first_step` on; `waited_s` is the time the trainer stood waiting for data."""

    def __init__(self, source: BatchSource, batch: int, seed: int, first_step: int = 0) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=READ_AHEAD)
        self._closed = threading.Event()
        rows = batches(source.store.count, batch, seed, first_step)
        self._thread = threading.Thread(target=self._fill, args=(source.batch, rows), daemon=True)
        self._thread.start()

    def _fill(self, make: Callable[[NDArray[np.int64]], Batch], rows: Iterator[NDArray[np.int64]]) -> None:
        while not self._closed.is_set():
            try:
                item: Batch | BaseException = make(next(rows))
            except BaseException as error:  # handed to the trainer, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue

    def next(self) -> Batch:
        """The next batch; raises what went wrong while reading it."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the reading thread."""
        self._closed.set()
        self._thread.join()
