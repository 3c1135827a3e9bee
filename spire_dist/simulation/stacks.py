"""The images of a set on disk, chunk by chunk, so that any size fits and an interruption costs one chunk at most.

The noise's height follows from all of the signal. So the signal is written first, and `progress.jsonl` has a line for each
chunk that is safely in its stack: its number of pixels, their sum and the sum of their squares, exactly. Then each stack gets
its noise in a new file. Called by `simulate.simulate`.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mrcfile
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.files import flush, remove, replacing, write_durably
from spire_dist.progress import progress
from spire_dist.simulation import folder
from spire_dist.simulation.states import States

Chunk = tuple[int, slice, slice]
"""State, rows within its stack, rows of the whole set."""
Picture = Callable[..., Tensor]
"""(coordinates, weights, rotations, shifts, ctf) of some particles -> their noiseless images."""


def chunks_of(counts: NDArray[np.int64], size: int) -> Iterator[Chunk]:
    """The particles in order, at most `size` of one state at a time."""
    for state, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts.tolist(), strict=True)):
        for first in range(0, count, size):
            last = min(first + size, count)
            yield state, slice(first, last), slice(start + first, start + last)


def write_signal(
    place: Path,
    ensemble: States,
    counts: NDArray[np.int64],
    chunks: list[Chunk],
    particles: Sequence[Tensor],
    picture: Picture,
    pixel_size: float,
) -> float:
    """Write what `picture` makes of (rotations, shifts, ctf) and return the standard deviation of all pixels."""
    log = place / "progress.jsonl"
    sums = _read_sums(log)
    (place / "signal").mkdir(exist_ok=True)
    with open(log, "a") as file:
        for state, here, rows in progress(chunks[len(sums) :], "projections", unit="chunk", done=len(sums)):
            images = picture(*ensemble.atoms(state), *(column[rows] for column in particles)).cpu().numpy()
            stack = _signal_path(place, state)
            if here.start == 0:
                folder.create_stack(stack, int(counts[state]), images.shape[1], pixel_size)
            folder.put_images(stack, here, images)
            flush(stack)
            # In numpy, whose sums do not depend on the number of threads.
            pixels = images.astype(np.float64)
            sums.append([pixels.size, float(pixels.sum()), float(np.square(pixels).sum())])
            file.write(json.dumps(sums[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
    total = np.zeros(3)
    for line in sums:
        total += line
    return float(np.sqrt(total[2] / total[0] - (total[1] / total[0]) ** 2))


def add_noise(place: Path, chunks: list[Chunk], noise_std: float, pixel_size: float, seed: int) -> None:
    """Move the stacks from signal/ to set/images/, with white noise of this standard deviation."""
    states = [state for state, here, _ in chunks if here.start == 0]
    for state in progress(states, "noise", unit="stack"):
        signal, stack = _signal_path(place, state), place / "set" / "images" / f"{state:03d}.mrcs"
        if noise_std > 0 and not stack.exists():
            own = [(here, rows) for of, here, rows in chunks if of == state]
            _write_noisy(stack, signal, own, noise_std, pixel_size, seed)
        elif not stack.exists():
            os.replace(signal, stack)
        remove(signal)


def _write_noisy(
    stack: Path, signal: Path, rows_of: list[tuple[slice, slice]], noise_std: float, pixel_size: float, seed: int
) -> None:
    with replacing(stack, flushed=True) as partial, mrcfile.mmap(signal, mode="r") as clean:
        assert clean.data is not None
        folder.create_stack(partial, len(clean.data), clean.data.shape[1], pixel_size)
        for here, rows in rows_of:
            rng = np.random.default_rng([seed, 3, rows.start])
            noise = rng.standard_normal(clean.data[here].shape, dtype=np.float32)
            folder.put_images(partial, here, clean.data[here] + noise_std * noise)


def _read_sums(log: Path) -> list[list[float]]:
    """What an earlier call wrote; a line that it could not finish is removed."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_durably(log, whole)
    return [json.loads(line) for line in whole.splitlines()]


def _signal_path(place: Path, state: int) -> Path:
    return place / "signal" / f"{state:03d}.mrcs"
