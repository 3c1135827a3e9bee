"""The order in which particles are seen: a pure function of (count, batch, seed, step), so that resuming needs one number.

Chunks of the store are shuffled, then the particles within groups of chunks: a batch needs only one group's chunks, and
the particles of a group lie at random anyway, since `prep` writes them in a seeded permutation.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spire_dist.schema import IMAGES_PER_CHUNK

CHUNKS_PER_GROUP = 16


def steps_per_epoch(count: int, batch: int) -> int:
    """Batches in one pass; the last one may be short, no particle is left out or repeated."""
    return math.ceil(count / batch)


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Every row 0..count-1 exactly once, [count]."""
    rng = np.random.default_rng((seed, epoch))
    starts = rng.permutation(np.arange(0, count, IMAGES_PER_CHUNK))
    groups = []
    for first in range(0, len(starts), CHUNKS_PER_GROUP):
        chunks = starts[first : first + CHUNKS_PER_GROUP]
        rows = np.concatenate([np.arange(start, min(start + IMAGES_PER_CHUNK, count)) for start in chunks])
        groups.append(rng.permutation(rows))
    return np.concatenate(groups) if groups else np.empty(0, dtype=np.int64)


def batches(count: int, batch: int, seed: int, first_step: int = 0) -> Iterator[NDArray[np.int64]]:
    """Rows of step `first_step`, `first_step + 1`, ... without end."""
    per_epoch = steps_per_epoch(count, batch)
    step = first_step
    while True:
        order = epoch_order(count, seed, step // per_epoch)
        for index in range(step % per_epoch, per_epoch):
            yield order[index * batch : (index + 1) * batch]
            step += 1
