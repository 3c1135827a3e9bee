"""Has pictures of a run's last checkpoint drawn, beside whatever else goes on: one at a time, each in a process of its own.

That process is gentle (low priority, one thread), gives its memory back when it ends, and nothing that a checkpoint does
to it, damaged or huge, reaches the page.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from cluster.drawn import Pictures
from spire_dist.errors import SpireError

PATIENCE_S = 600.0
"""After which a picture is given up."""

NICENESS = 5
"""A quarter of a core where training has all of them; the 1 % of the lowest priority would end in no picture at all."""


class Painter:
    """Keeps the newest pictures of each run; `look` asks for those of a newer checkpoint and does not wait for them."""

    def __init__(self) -> None:
        # The thread hands its signal mask to the processes it starts: Ctrl-C is for the page alone to answer.
        self._thread = ThreadPoolExecutor(1, "painter", signal.pthread_sigmask, (signal.SIG_BLOCK, {signal.SIGINT}))
        self._lock = threading.Lock()
        self._asked: dict[Path, tuple[str, Future[Pictures]]] = {}
        self._newest: dict[Path, Pictures] = {}
        self._process: BaseProcess | None = None

    def look(self, run: Path) -> tuple[Pictures | None, str]:
        """The newest pictures there are of a run, and why they are not of its last checkpoint ("" where they are)."""
        checkpoint = last_checkpoint(run)
        if checkpoint is None:
            return None, "no checkpoint yet"
        with self._lock:
            asked, future = self._asked.get(run, ("", None))
            if future is not None and future.done() and not future.cancelled() and future.exception() is None:
                self._newest[run] = future.result()
            if future is None or (asked != checkpoint and future.done()):
                asked, future = checkpoint, self._thread.submit(self._draw, run)
                self._asked[run] = asked, future
            newest = self._newest.get(run)
            if newest is not None and newest.checkpoint == checkpoint:
                return newest, ""
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                return newest, f"{checkpoint} cannot be drawn: {error}"
            return newest, f"{checkpoint} is being drawn"

    def _draw(self, run: Path) -> Pictures:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_draw_and_send, args=(there, run), daemon=True)
        process.start()
        there.close()
        self._process = process
        try:
            found = here.recv() if here.poll(PATIENCE_S) else f"not done in {PATIENCE_S:.0f} s"
        except EOFError:
            process.join()
            found = f"the process that drew it ended with code {process.exitcode}"
        finally:
            process.terminate()
            process.join()
            here.close()
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def close(self) -> None:
        """Draw no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.terminate()


def last_checkpoint(run: Path) -> str | None:
    """The name of a run's last checkpoint; None where there is none."""
    with suppress(OSError):
        return (run / "latest").read_text().strip() or None
    return None


def _draw_and_send(pipe: Connection, run: Path) -> None:
    """In the process of its own: pictures, or the reason why there are none."""
    os.nice(NICENESS)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    try:
        from cluster.pictures import draw

        pipe.send(draw(run))
    except (SpireError, OSError, ValueError, MemoryError) as error:
        pipe.send(" ".join(str(error).split()) or type(error).__name__)
