"""What a measurement is made on, and on how many threads. Called by every benchmark."""

import numba
import torch

from spire_dist.comparison.machine import describe_machine, machine_line
from spire_dist.machine import cores

__all__ = ["describe_machine", "machine_line", "use_threads"]


def use_threads(threads: int) -> int:
    """The same number for torch and for the CPU projector; 0 takes all cores. Returns the number."""
    threads = threads or cores()
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    return threads
