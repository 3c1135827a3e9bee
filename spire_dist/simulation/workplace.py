"""Where a set is made before it has its name: `.OUT.partial`, which an interruption leaves for the same call to go on in.

    set/              the files as they will be, some perhaps still missing
    signal/           stacks without their noise
    settings.json     what the set is made of; other settings are refused
    progress.jsonl    what is in signal/ (`stacks`)
    lock              held by the process that works here

Called by `simulate.simulate`.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spire_dist.errors import ConfigError, Stopped
from spire_dist.files import flush, remove, write_json

GIB = 2**30


def refuse_taken(out: Path) -> None:
    """Raise ConfigError where there is something that the set would replace."""
    if out.name in ("", ".."):
        raise ConfigError(f"out: {out} is no name for a new folder; name one in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} exists and is not an empty folder; choose a new one or remove it")


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raise ConfigError where `needed` bytes, less those that are there already, are not free."""
    parent = next(p for p in out.absolute().parents if p.is_dir())
    made = sum(p.stat().st_blocks * 512 for p in _place(out).rglob("*") if p.is_file())
    free = shutil.disk_usage(parent).free + made
    if needed > free:
        raise ConfigError(
            f"out: {out} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in {parent}; choose another place, a "
            "smaller box or fewer particles"
        )


@contextmanager
def workplace(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder to make a set in, which then takes the place of `out`; `settings` (JSON) must be those it was begun with.

    Raises ConfigError where another process works there, or other settings were used, and Stopped on Ctrl-C.
    """
    place = _place(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = open(place / "lock", "a")  # noqa: SIM115 (kept open for as long as the block lasts)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made ({error.strerror}); choose a place you may write to") from error
    with lock:
        if not _held(lock, place / "lock"):
            raise ConfigError(f"out: {out} is being made by another process; wait for it or choose another folder")
        try:
            refuse_taken(out)  # by a process that has ended since the last look
        except ConfigError:
            remove(place)
            raise
        _begin_or_go_on(place, settings)
        try:
            yield place
        except KeyboardInterrupt:
            raise Stopped(f"{out}: stopped; what is made is kept in {place}, and the same command goes on") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"out: {place}: {error.strerror}; make room, and the same command goes on") from error
        for path in (*(place / "set").rglob("*"), place / "set"):
            flush(path)
        os.replace(place / "set", out)
        flush(out.absolute().parent)
        remove(place)


def _place(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _held(lock: IO[str], path: Path) -> bool:
    """Whether this process has the lock now, and the file is still the one that others see."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def _begin_or_go_on(place: Path, settings: dict[str, Any]) -> None:
    path = place / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists() or not (place / "set").is_dir():  # cut off as it began, or when the set had got its name
        for left in place.iterdir():
            if left.name != "lock":
                remove(left)
        (place / "set").mkdir()
        write_json(path, settings)
        return
    begun = json.loads(path.read_text())
    for name in (*settings, *begun):
        if begun.get(name) != settings.get(name):
            raise ConfigError(
                f"{place}: holds a set begun with {name} = {_short(begun.get(name))}, not {_short(settings.get(name))}; give "
                "the same settings to go on, or remove the folder to begin anew"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
