"""One shuffled epoch of a store into float32 batches, in a process of its own; what it took as JSON. Called by `loading`.

    python -m benchmarks.epoch STORE WORKERS

The processes that read import this module again, so it imports nothing that they do not need.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from spire_dist.data.blocks import local_blocks
from spire_dist.data.loader import BatchSource, Prefetcher
from spire_dist.data.store import ParticleStore

BATCH = 64


def run_epoch(path: Path, workers: int) -> dict[str, float]:
    """Seconds to the first batch, with which reading processes have started, and from there to the end of the epoch."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    store = ParticleStore.open(path)
    source = BatchSource(store, blocks=partial(local_blocks, store, workers))
    order = source.order(BATCH, seed=0)
    data = Prefetcher(source.particles(order))
    seen = np.zeros(store.count, dtype=np.uint8)
    try:
        particles = data.next()
        first = time.perf_counter()
        for _ in range(order.steps_per_epoch - 1):
            seen[particles.rows] += 1
            particles = data.next()
        seen[particles.rows] += 1
        end = time.perf_counter()
    finally:
        data.close()
    assert particles.pixels.dtype == torch.float32
    assert (seen == 1).all(), "every particle once"
    return {"particles": store.count, "start_s": first - start, "s": end - first}


if __name__ == "__main__":
    print(json.dumps(run_epoch(Path(sys.argv[1]), int(sys.argv[2]))))
