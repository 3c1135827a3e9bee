"""Files that are complete or absent: written under a temporary name beside their place, flushed, then renamed."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGE = 4096
PIECE = 2**23
"""Bytes written at once without the system's cache."""


@contextmanager
def replacing(path: Path, *, flushed: bool = False, shared: bool = False, over: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder: takes its place if the block ends well, else disappears.

    Without `over` a folder that is there already must be empty, else OSError is raised and it stays as it is.

    With `flushed` the content and the name outlive a power cut as well. With `shared` other processes, on any machine, may
    be making the same file: each has a temporary name of its own, and the last to end wins. What a killed process leaves,
    the next to use its name removes; under `shared` that is nobody, so whoever waits for them must.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.stem}{writer}.partial{path.suffix}")
    remove(partial)
    try:
        yield partial
        if flushed:
            for part in (*partial.rglob("*"), partial):
                flush(part)
        if over and path.is_dir():
            remove(path)
        os.replace(partial, path)
        if flushed:
            flush(path.parent)
    finally:
        remove(partial)


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """JSON that is complete or absent, also after a power cut."""
    write_durably(path, json.dumps(content, indent=1), shared=shared)


def write_durably(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a small file: the old text or the new one is there at any moment, and the new one survives a power cut."""
    with replacing(path, flushed=True, shared=shared) as partial:
        partial.write_text(text)


def write_uncached(path: Path, data: memoryview) -> int:
    """Begin a new file with as much of `data` as can go to the disk without a copy in the system's cache; returns how much.

    That is all but the last odd bytes, or nothing where the file system or the system knows no such writing.
    """
    whole = len(data) // PAGE * PAGE
    done = 0
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
    except (OSError, AttributeError):  # AttributeError: not on a Mac
        return 0
    try:
        while done < whole:
            done += os.write(handle, data[done : min(done + PIECE, whole)])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
    return done


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
