"""Who trains in a run directory: one run of the program at a time, and of one Slurm job its newest life.

A lock keeps a second program out. Slurm may give a node up that still works, cut off from the others, and start the job again
elsewhere: the new life then takes the directory from the old one, whose lock stands in its way, and the old one saves no more
(`superseded`). `.lock` names the holder, one line of JSON.
"""

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from spire_dist.errors import RunError

LOCK = ".lock"

_held: dict[Path, str] = {}
"""What this process wrote into the locks it holds."""


def life() -> str:
    """Of this process' Slurm job, "4711-2" for the second time it was queued again; empty outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


@contextmanager
def sole_trainer(run: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises RunError while another one trains there (requeued and by hand, say)."""
    path = run / LOCK
    own = json.dumps({"life": life(), "host": socket.gethostname(), "pid": os.getpid(), "key": uuid.uuid4().hex})
    file = open(path, "a+")  # noqa: SIM115 (kept open for as long as the block lasts)
    try:
        if not _locked(file):
            holder = _read(path)
            if not _earlier(holder):
                raise RunError(
                    f"{run}: another process trains here (pid {holder.get('pid', '?')} on {holder.get('host', '?')}); wait for "
                    "it or stop it"
                )
            file.close()
            path.unlink()  # the old life keeps the lock of a file that has no name any more
            file = open(path, "a+")  # noqa: SIM115
            _locked(file)
        file.truncate(0)
        file.write(own)
        file.flush()
        os.fsync(file.fileno())
        _held[run.absolute()] = own
        yield
    finally:
        if _held.pop(run.absolute(), None):
            file.truncate(0)
        file.close()


def superseded(run: Path) -> bool:
    """Whether a newer life of this job has taken the run directory, so that this process must not write there."""
    path, own = run / LOCK, _held.get(run.absolute())
    if own is None:  # another rank of the holder, or nobody: a run directory that is read
        return _later(_read(path))
    try:
        return path.read_text() != own
    except OSError:
        return False


def refuse_superseded(run: Path) -> None:
    """Raise RunError where `superseded`."""
    if superseded(run):
        holder = _read(run / LOCK)
        raise RunError(
            f"{run}: a newer life of this job ({holder.get('life', 'ended')} on {holder.get('host', '?')}) trains here; this "
            "one ends and saves nothing"
        )


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _lives(holder: dict[str, Any]) -> tuple[int, int] | None:
    """(the holder's restart count, ours), where both are of one Slurm job."""
    theirs, own = str(holder.get("life", "")).rpartition("-"), life().rpartition("-")
    return (int(theirs[2]), int(own[2])) if own[0] and theirs[0] == own[0] else None


def _earlier(holder: dict[str, Any]) -> bool:
    lives = _lives(holder)
    return lives is not None and lives[0] < lives[1]


def _later(holder: dict[str, Any]) -> bool:
    lives = _lives(holder)
    return lives is not None and lives[0] > lives[1]
