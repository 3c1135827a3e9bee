"""The engine of one machine: processes that make shards. Called by `convert.prepare` and by the editing verbs.

Workers are copies of one process that has imported what they need while the plan was made. They import nothing but this
module and what it needs, so that the first shard begins soon.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from data_prep.shards import write_shard
from spire_dist.errors import StoreError

PROCESSES = multiprocessing.get_context("forkserver")


def in_processes(store: Path, shards: list[int], workers: int) -> Iterator[int]:
    """The engine of one machine: `workers` processes, each making one shard at a time."""
    if min(workers, len(shards)) <= 1:
        yield from (write_shard(store, shard) for shard in shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), PROCESSES, initializer=_leave_with_parent) as pool:
        with _interruptions_held_back():
            tasks = [pool.submit(write_shard, store, shard) for shard in shards]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool as error:
            raise StoreError(
                f"{store}: a worker was killed, perhaps for its memory; run the same command again with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def begin_to_import() -> None:
    """Have what every worker needs imported in the background, once; workers are copies of the process that does it."""
    PROCESSES.set_forkserver_preload([__name__])
    with _interruptions_held_back():
        forkserver.ensure_running()


@contextmanager
def _interruptions_held_back() -> Iterator[None]:
    """Start processes that never see Ctrl-C, from their first moment on: it is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_with_parent() -> None:
    """In a worker: do not outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
