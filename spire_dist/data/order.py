"""The order in which particles are seen: a pure function of (count, chunk, batch, seed) and the step, the same for any
number of ranks and reading processes. Called by the loader, by readers of blocks and by the trainer.

The store's chunks are shuffled anew in every epoch, and their sequence is cut into blocks of 64 chunks (less where that is
not whole steps, one step where that is more). V virtual readers have equal runs of a block; each shuffles its images, and
each step takes as many from every one of them. So a batch is drawn from V places, what is read is read once, and a rank
serves the readers r V / W and on, without knowing of the others; where there are more ranks than readers, W / V of them share
one. The last block of an epoch is what remains, in V runs of equal length (±1); the step that is short is the epoch's last.
(Virtual readers are what MosaicML's streaming calls canonical nodes.)
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import ConfigError

MOST_READERS = 64
BLOCK_CHUNKS = 64
NOTHING = -1
"""Stands in the place of an image that a short step lacks."""


@dataclass(frozen=True)
class Portion:
    """What one rank reads for one block, and how it becomes that rank's share of the block's S steps."""

    first_step: int
    """Step, counted from the start of training, of the first row of `index`."""
    runs: NDArray[np.int64]
    """[R, 2]: first row of the store and number of rows, each within a chunk; to be read in this order. Ranks that share a
    reader have the same."""
    index: NDArray[np.int64]
    """[S, batch / world]: places among the images read, or NOTHING."""
    totals: NDArray[np.int64]
    """[S]: particles in the step, of all ranks together."""

    @property
    def size(self) -> int:
        """Images to read."""
        return int(self.runs[:, 1].sum())

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[S, batch / world]: rows of the store, or NOTHING."""
        read = [np.arange(first, first + count) for first, count in self.runs]
        return np.concatenate([*read, [NOTHING]])[self.index]  # the last one stands where the index is -1


@dataclass(frozen=True)
class Order:
    """The order of `count` particles in batches of `batch`, without end; steps are counted from 0 through all epochs."""

    count: int
    images_per_chunk: int
    batch: int
    seed: int

    @cached_property
    def readers(self) -> int:
        """V, virtual readers: the largest divisor of the batch up to 64."""
        return next(n for n in range(min(self.batch, MOST_READERS), 0, -1) if self.batch % n == 0)

    @cached_property
    def block_images(self) -> int:
        """Images of a whole block: the most whole steps that 64 chunks hold, at least one; for common batches all of them."""
        return self.batch * max(1, BLOCK_CHUNKS * self.images_per_chunk // self.batch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass; the last one may be short, no particle is left out or repeated."""
        return -(-self.count // self.batch)

    @property
    def blocks_per_epoch(self) -> int:
        """Blocks in one pass; the last one may be short."""
        return -(-self.count // self.block_images)

    def block_of(self, step: int) -> int:
        """Number, from 0 through all epochs, of the block that holds a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.blocks_per_epoch + within * self.batch // self.block_images

    def portion(self, block: int, rank: int = 0, world: int = 1) -> Portion:
        """What rank `rank` of `world` reads for a block. Raises ConfigError where the readers cannot be shared equally."""
        self._refuse_unequal_shares(world)
        epoch, number = divmod(block, self.blocks_per_epoch)
        first = number * self.block_images
        cuts, mine = self._cuts(block), self._readers_of(rank, world)
        size = int(cuts[-1])
        steps, taken, share = -(-size // self.batch), self.batch // self.readers, self.batch // world
        starts, lengths = cuts[:-1], np.diff(cuts)
        places = np.arange(steps * taken)
        rng = np.random.default_rng((self.seed, epoch, number + 1))  # a 0 there would be the chunks' generator
        keys = rng.random((self.readers, len(places)))[mine]
        keys[places >= lengths[mine, None]] = np.inf
        shuffled = (starts[mine] - starts[mine][0])[:, None] + np.argsort(keys, axis=1, kind="stable")
        shuffled[places >= lengths[mine, None]] = NOTHING
        index = shuffled.reshape(-1, steps, taken).swapaxes(0, 1).reshape(steps, -1)
        begin = rank * share - mine.start * taken  # 0, unless it shares its reader
        return Portion(
            first_step=epoch * self.steps_per_epoch + first // self.batch,
            runs=self._runs(epoch, first + int(cuts[mine][0]), first + int(cuts[mine.stop])),
            index=index[:, begin : begin + share],
            totals=np.minimum(self.batch, size - np.arange(steps) * self.batch),
        )

    def span(self, block: int, rank: int, world: int) -> slice:
        """Where the images that a rank reads lie in the block's sequence."""
        cuts, mine = self._cuts(block), self._readers_of(rank, world)
        return slice(int(cuts[mine.start]), int(cuts[mine.stop]))

    def shares(self, world: int) -> bool:
        """Whether the readers can be shared equally by so many ranks."""
        return self.readers % world == 0 or (world % self.readers == 0 and self.batch % world == 0)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Rows of the store [batch / world] that a rank sees at a step; NOTHING where the last step of an epoch is short.

        Ranks one after the other give what one rank alone sees.
        """
        portion = self.portion(self.block_of(step), rank, world)
        return portion.rows[step - portion.first_step]

    def _runs(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Images `start` to `stop` of an epoch's sequence of chunks, as (first row, number of rows) within chunks."""
        size = self.images_per_chunk
        places = np.arange(start // size, -(-stop // size) if stop > start else start // size)
        begin, end = np.maximum(places * size, start), np.minimum((places + 1) * size, stop)
        chunks = _chunk_order(-(-self.count // size), self.count // size, self.seed, epoch)[places]
        return np.stack([chunks * size + begin % size, end - begin], axis=1)

    def _cuts(self, block: int) -> NDArray[np.int64]:
        """[V + 1]: reader v has images cuts[v] to cuts[v + 1] of the block's: equal runs, or (±1) of what remains."""
        first = block % self.blocks_per_epoch * self.block_images
        return np.arange(self.readers + 1) * min(self.block_images, self.count - first) // self.readers

    def _readers_of(self, rank: int, world: int) -> slice:
        return slice(rank * self.readers // world, -(-(rank + 1) * self.readers // world))

    def _refuse_unequal_shares(self, world: int) -> None:
        if not self.shares(world):
            near = (batch for by in count(1) for batch in (self.batch + by, self.batch - by) if batch > 0)
            works = next(batch for batch in near if replace(self, batch=batch).shares(world))
            raise ConfigError(
                f"batch = {self.batch}: its images come from {self.readers} readers, which {world} ranks cannot share equally; "
                f"a batch of {works} works"
            )


@lru_cache(maxsize=2)
def _chunk_order(chunks: int, full: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All chunks in an epoch's order; one that is short comes last."""
    order = np.random.default_rng((seed, epoch)).permutation(full)
    return np.concatenate([order, np.arange(full, chunks)])
