"""`data.loader = "ray"`: the blocks of training (`spire_dist.data.blocks`), read by actors of a Ray cluster.

Every node has one pool of readers, named after the run, which all ranks of the node find and share. A block is read, and
decompressed where it is compressed, once for all of them, and each rank copies its own part of it from Ray's object store.
What is read is known by the numbers of block and rank alone, so a reader that was killed is replaced by any other, and no
particle is lost or seen twice. Where Ray dies on the node, all of it, each rank goes on reading by itself. Called by
`spire-dist train`; `spire_dist` itself never imports Ray.
"""

import hashlib
import socket
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.ray_cluster import ray_cluster, require_ray, told_by_a_worker
from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError
from spire_dist.machine import local_ranks

if TYPE_CHECKING:
    from spire_dist.data.blocks import Blocks

READERS = 2
"""Actors per node; so many blocks are read ahead."""
KEPT = 2
"""Blocks that a reader holds for ranks that have not taken their part; ranks work in step, at most a block apart."""
TRIES = 10
"""So often a block is asked for when its readers are killed."""
LOOK_S = 10.0
"""Ray answers no call for a reader on a node that it holds for dead: so often a rank that waits sees whether it does."""


@contextmanager
def ray_blocks(
    store: Path, run: Path, batch: int, readers: int = READERS, address: str | None = None
) -> Iterator["Blocks"]:
    """Inside the block: what reads the particles of `store` for the run directory `run`, by `readers` actors on this node.

    There is room for blocks of batches of up to `batch` images. `address` as for `ray_cluster`: ranks share readers where it,
    or RAY_ADDRESS, names a cluster; else each starts its own, which reads its part alone.
    Raises ConfigError where there is no Ray, StoreError for a store that cannot be read.
    """
    particles = ParticleStore.open(store)
    block = Order(particles.count, particles.images_per_chunk, batch, 0).block_images
    block_bytes = min(block, particles.count) * particles.box**2 * particles.images.dtype.itemsize
    digest = hashlib.sha256(f"{run.absolute()} {store.absolute()}".encode()).hexdigest()[:12]
    sharing = 1 if require_ray(address) == "local" else local_ranks()
    with ray_cluster(address, cpus=readers, object_store_bytes=(readers + 2) * block_bytes):
        yield partial(_blocks, Pool(store.absolute(), f"{run.name}-{digest}", readers), sharing)


@dataclass(frozen=True)
class Part:
    """What one rank asks for: its part of a block."""

    order: Order
    block: int
    rank: int
    world: int
    local: int
    """Ranks on its node, which are neighbours."""

    @property
    def node(self) -> int:
        """Number of its node; for the order, a node is one rank of fewer."""
        return self.rank // self.local

    def within(self) -> slice:
        """Where it lies among the images of its node's block."""
        own = self.order.span(self.block, self.rank, self.world)
        first = self.order.span(self.block, self.node, self.world // self.local).start
        return slice(own.start - first, own.stop - first)


def _blocks(pool: "Pool", sharing: int, order: Order, rank: int, world: int, first: int) -> Generator[NDArray[Any]]:
    """Blocks of a rank from `first` on, as many being read ahead as there are readers, which `sharing` ranks share."""
    local = sharing if world % sharing == 0 else 1
    parts = (Part(order, block, rank, world, local) for block in count(first))
    ahead = deque((part, pool.ask(part)) for part in islice(parts, pool.readers))
    for part in parts:
        images = pool.take(*ahead.popleft())
        ahead.append((part, pool.ask(part)))
        yield images


@dataclass
class Pool:
    """The readers of this node, found by name or started."""

    store: Path
    name: str
    readers: int
    _found: dict[int, Any] = field(default_factory=dict)
    _alone: "Reader | None" = None
    """What reads in this process once its node of the cluster is gone."""

    def ask(self, part: Part) -> Any:
        """Have it read; `take` waits for the answer."""
        if self._alone:
            return None
        number = part.block % self.readers
        if number not in self._found:
            self._found[number] = self._reader(number)
        return self._found[number].read.remote(part)

    def take(self, part: Part, answer: Any) -> NDArray[Any]:
        """The images [n, D, D]; asked for again where their reader was lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        for _ in range(TRIES):
            try:
                while not (self._alone or ray.wait([answer], timeout=LOOK_S)[0]):
                    self._look_at_node()
                if not self._alone:
                    return np.array(
                        ray.get(answer)
                    )  # Ray ends a process that still has an object when its node's store dies
            except RayTaskError as error:
                raise told_by_a_worker(error) from None
            except OSError:  # the connection to this node's part of the cluster
                self._go_on_alone()
            except RayError as error:
                lost = type(error).__name__
                self._look_at_node()
            if self._alone:
                return self._alone.read(replace(part, local=1))
            time.sleep(0.2)  # until its name is free
            del self._found[part.block % self.readers]
            answer = self.ask(part)
        raise StoreError(
            f"data.loader = ray: readers of {self.store} were lost {TRIES} times over one block ({lost}), perhaps for their "
            "memory; give the job more, or set data.loader = local"
        )

    def _look_at_node(self) -> None:
        """Go on alone where the cluster holds this node for dead."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        if not any(entry["Alive"] for entry in ray.nodes() if entry["NodeID"] == node):
            self._go_on_alone()

    def _go_on_alone(self) -> None:
        died = f"data.loader = ray: Ray has died on {socket.gethostname()}"
        print(f"{died}; this rank reads its images itself from now on", file=sys.stderr)
        self._alone = Reader(self.store)

    def _reader(self, number: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(Reader).options(
            name=f"{self.name}-{node}-{number}",
            namespace="spire-dist",
            get_if_exists=True,
            num_cpus=0,  # does not wait for cores that others hold
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return actor.remote(self.store)


@dataclass
class Reader:
    """The actor: reads one block after the other; started again, it needs nothing of its former life."""

    path: Path
    _kept: dict[tuple[Order, int, int], tuple[NDArray[Any], set[int]]] = field(default_factory=dict)
    """Blocks of a node, and the ranks that have not taken their parts."""

    @cached_property
    def store(self) -> ParticleStore:
        """Opened for the first block, so that whoever asks for it is told what is wrong."""
        return ParticleStore.open(self.path)

    def read(self, part: Part) -> NDArray[Any]:
        """The images [n, D, D], as stored, of a part: read for all ranks of the node at once and kept for the others."""
        key = part.order, part.block, part.node
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            runs = part.order.portion(part.block, part.node, part.world // part.local).runs
            self.store.images.announce(runs)
            first = part.node * part.local
            self._kept[key] = self.store.images.read(runs), set(range(first, first + part.local))
        images, waiting = self._kept[key]
        waiting.discard(part.rank)
        if not waiting:
            del self._kept[key]
        return images[part.within()]
