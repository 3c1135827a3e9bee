"""The files of a run directory as `status` and `monitor` find them, at any moment of a run that others write.

Files may be missing, half written, of an older version or vanish while they are read: what cannot be used is left out, and
nothing here raises for it. `run_states.py` makes one typed state of this.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from spire_dist.config import RunConfig, load_config
from spire_dist.errors import ConfigError, RunError

Record = Mapping[str, Any]

MARKS = ("STATUS.json", "jobs/job.json", "metrics.jsonl")
"""Any of them makes a folder a run directory."""

DEPTH = 2
"""Folders below a given one that are looked into: a sweep's runs are OUT/trials/NNNN."""

TAIL_BYTES = 2**16
"""Read of a long file for its newest lines: some 250 log intervals."""


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says; records as they were written (see `training/metrics.py`, `distributed/heartbeat.py`)."""

    path: Path
    status: Record
    records: tuple[Record, ...]
    """Newest lines of metrics.jsonl, the newest last."""
    ranks: Mapping[int, Record]
    """Newest line of each rank."""
    beats: Mapping[int, Record]
    """Sign of life of each rank, with the time of its file as `seen`."""
    lives: tuple[Record, ...]
    job: Record
    """Newest job; empty where there was none."""
    config: RunConfig | None

    @property
    def newest(self) -> Record:
        """The newest log line, empty where there is none."""
        return self.records[-1] if self.records else {}

    @property
    def world(self) -> int:
        """Ranks of the newest life."""
        newest = max(self.beats.values(), key=lambda beat: beat["time"], default={})
        return whole(newest, "world") or whole(self.newest, "ranks") or 1


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among `paths` and up to `DEPTH` folders below them, each once; may be none.

    Raises RunError for a path that is no folder.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such folder; give run directories, or folders that hold some")
        for run in _runs_below(path, DEPTH):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in MARKS):
        yield folder
    elif depth > 0 and folder.suffix != ".zarr":
        with suppress(OSError):
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
            for name in names:
                yield from _runs_below(folder / name, depth - 1)


def read_files(run: Path) -> RunFiles:
    """Everything that tells how a run is doing, read now; no more than the ends of long files."""
    files = RunFiles(
        path=run,
        status=read_record(run / "STATUS.json"),
        records=tail(run / "metrics.jsonl"),
        ranks={rank: _last_line(path) for rank, path in rank_logs(run)},
        beats={rank: beat for rank, path in _numbered(run / "ranks", "beat-*.json") if (beat := _beat(path))},
        lives=tail(run / "jobs" / "lives.jsonl"),
        job=read_record(run / "jobs" / "job.json"),
        config=_config(run),
    )
    return replace(
        files,
        ranks={
            rank: record for rank, record in files.ranks.items() if rank < files.world
        },  # others: of an earlier life
        beats={rank: beat for rank, beat in files.beats.items() if rank < files.world},
    )


def rank_logs(run: Path) -> list[tuple[int, Path]]:
    """(rank, its log); none where there is one rank alone."""
    return _numbered(run / "ranks", "rank-*.jsonl")


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    with suppress(OSError):
        paths = [(path.stem.rpartition("-")[2], path) for path in sorted(folder.glob(pattern))]
        return [(int(digits), path) for digits, path in paths if digits.isdecimal()]
    return []


def _beat(path: Path) -> Record:
    beat = read_record(path)
    with suppress(OSError):
        return {**beat, "seen": path.stat().st_mtime} if number(beat, "time") is not None else {}
    return {}


def _last_line(path: Path) -> Record:
    return next(reversed(tail(path, TAIL_BYTES // 64)), {})


def read_record(path: Path) -> Record:
    """A JSON object; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def tail(path: Path, size: int = TAIL_BYTES) -> tuple[Record, ...]:
    """The newest lines of a JSONL file, at least one if it is shorter than `size` bytes."""
    with suppress(OSError), open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - size))
        lines = file.read().split(b"\n")
        return tuple(_parsed(lines[1:] if length > size else lines))
    return ()


def thinned(path: Path, most: int) -> list[Record]:
    """At most `most` lines of a JSONL file, evenly spread, with the first and the last one."""
    with suppress(OSError):
        lines = [line for line in path.read_bytes().split(b"\n") if line]
        if lines and not any(_parsed(lines[-1:])):
            lines.pop()  # just being written
        if len(lines) > most:
            step = (len(lines) - 1) / (most - 1)
            lines = [lines[round(place * step)] for place in range(most)]
        return list(_parsed(lines))
    return []


def _parsed(lines: Sequence[bytes]) -> Iterator[Record]:
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def number(record: Record, key: str) -> float | None:
    """A finite number of a record; None where there is none."""
    value = record.get(key)
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    return None


def whole(record: Record, key: str) -> int | None:
    """A count of a record; None where there is none."""
    value = number(record, key)
    return None if value is None else int(value)


def moment(record: Record) -> float | None:
    """`time` of a record in epoch seconds, however it was written."""
    if not isinstance(record.get("time"), str):
        return number(record, "time")
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(record["time"]).timestamp()
    return None


def _config(run: Path) -> RunConfig | None:
    with suppress(ConfigError):
        return load_config(run / "config.toml")
    return None
