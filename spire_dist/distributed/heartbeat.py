"""A sign of life of each rank in the run directory, `ranks/beat-0003.json`, which anything that sees the files can read.

The ranks' own signs (`pulse.py`) go through a store that dies with them. A thread replaces this file every `PERIOD_S`: it goes
on while the rank waits for others and stands still when the process is stopped, dead or cut off.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from spire_dist.distributed.holder import superseded
from spire_dist.distributed.mesh import Mesh
from spire_dist.distributed.pulse import WAITING
from spire_dist.errors import Stopped
from spire_dist.files import replacing

PERIOD_S = 5.0


class Heartbeat:
    """Writes the file while the block lasts; `where`, the (stage, step) reached, is kept up to date by training."""

    def __init__(self, run: Path, mesh: Mesh, where: tuple[int, int]) -> None:
        self.where = where
        self._run, self._mesh = run, mesh
        self._path = run / "ranks" / f"beat-{mesh.rank:04d}.json"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._mesh.rank == 0:
            remove_beats(self._run, self._mesh.world)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends as it should leaves no file: one that is there tells of a rank that lives, or did not end well."""
        self._ended.set()
        self._thread.join()
        if (value is None or getattr(value, "exit_code", None) == Stopped.exit_code) and not superseded(self._run):
            self._path.unlink(missing_ok=True)

    def _beat_on(self) -> None:
        while not self._ended.wait(PERIOD_S):
            if superseded(self._run):
                return
            with suppress(
                OSError
            ):  # a full disk must not end a run that could still save elsewhere; the next one may do
                self._beat()

    def _beat(self) -> None:
        stage, step = self.where
        sign = {
            "time": round(time.time(), 2),
            "rank": self._mesh.rank,
            "world": self._mesh.world,
            "stage": stage,
            "step": step,
            "waiting": WAITING.now,
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
        with replacing(self._path) as partial:
            partial.write_text(json.dumps(sign))


def remove_beats(run: Path, world: int) -> None:
    """Drop the files of ranks beyond `world`, which an earlier life with more ranks left."""
    for path in (run / "ranks").glob("beat-*.json"):
        if int(path.stem.removeprefix("beat-")) >= world:
            path.unlink(missing_ok=True)
