"""Rivals are programs of environments of their own, only ever run as separate processes: found, run, and stopped with ours.

RUN/log.txt      all that a program said, over restarts
RUN/rival.json   what it was started with
"""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spire_dist.comparison.methods import RIVALS
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import ConfigError, RunError, Stopped
from spire_dist.files import write_json
from spire_dist.maps import read_map
from spire_dist.results.runs import read_json
from spire_dist.training.metrics import say

LOOK_SECONDS = 0.5
"""Between two looks at a process that works."""


@dataclass(frozen=True)
class Program:
    """An installed rival."""

    name: str
    """Of `RIVALS`, and of the console script beside its Python."""
    python: Path
    threads: int
    version: str

    @property
    def command(self) -> Path:
        """The console script."""
        return self.python.with_name(self.name)


@dataclass(frozen=True)
class RivalModel:
    """What a rival has learned as something that can be scored (`results.evaluate.Scorable`)."""

    run: Path
    store: ParticleStore
    latents: NDArray[np.float32]
    """[N, L], in the store's row order."""
    decode: Callable[[Path, Path, int], Sequence[Path]]
    """Writes the maps of a file of latents, a line for each, into a new folder; their number is given, their paths returned."""
    consensus: None = None

    @property
    def box(self) -> int:
        """Side of the maps in voxels."""
        return self.store.box

    @property
    def pixel_size(self) -> float:
        """Å per voxel."""
        return self.store.pixel_size

    def volumes(self, latents: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """The maps at latents [B, L]."""
        with TemporaryDirectory(prefix=".maps-", dir=self.run) as folder:
            points = Path(folder) / "z.txt"
            np.savetxt(points, latents)
            for path in self.decode(points, Path(folder) / "maps", len(latents)):
                yield read_map(path)[0]


def in_rows(latents: NDArray[np.float32], store: ParticleStore, run: Path) -> NDArray[np.float32]:
    """Latents of all images of the input file, in its order, as those of the store's rows. Raises RunError."""
    if len(store.sources) > 1 or len(latents) <= store.source_index.max():
        raise RunError(f"{run}: latents of {len(latents)} images, the store has others; begin a new run")
    return latents[store.source_index]


def find_program(name: str, python: Path, threads: int) -> Program:
    """The program `name` of an environment's Python. Raises ConfigError where it has none."""
    return Program(name, python, threads, versions(name, python))


def versions(name: str, python: Path) -> str:
    """What is compared with, "cryoDRGN 4.3.1 (torch 2.13.0)". Raises ConfigError where the environment of `python` has none."""
    rival = RIVALS[name]
    code = f"from importlib.metadata import version as v; print(v({name!r}), v({rival.runs_on!r}))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{python}: no Python with {rival.label}; {rival.install} PEER/bin/python") from error
    return f"{rival.label} {found[0]} ({rival.runs_on} {found[1]})"


def environment(threads: int) -> dict[str, str]:
    """For its process: its own defaults, not ours (neither our modules nor how our threads wait), on `threads` threads."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
    return kept | {name: str(threads) for name in ("OMP_NUM_THREADS", "NPROC")}  # the latter is what XLA goes by


def begin(run: Path, facts: dict[str, Any]) -> None:
    """A run goes on only with what it was started with. Raises RunError."""
    known = read_json(run / "rival.json")
    for name, value in facts.items():
        if known and known.get(name) != value:
            now, before = json.dumps(value), json.dumps(known.get(name))
            raise RunError(f"{run}: started with {name} {before}, now {now}; use the same, or another --out")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "rival.json", facts)


def run_program(
    program: Program,
    command: str,
    words: Sequence[Any],
    run: Path,
    progress: Callable[[str], Sequence[str]] = lambda log: (),
) -> None:
    """Run one of its commands to the end, all it says going to log.txt; it stops with this process.

    command   what the words make it do, to tell of a failure
    progress  what the log holds that is worth telling, each said once

    Raises RunError with its last line where it fails or one is at work already, Stopped where a signal asked for it.
    """
    path = run / "log.txt"
    with StopFlag() as stop, open(path, "a") as log, open(run / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the process inherits, should this one be killed
        except BlockingIOError:
            label = RIVALS[program.name].label
            raise RunError(f"{run}: {label} is at work here for another call; wait for it or stop it") from None
        process = subprocess.Popen(
            list(map(str, words)), env=environment(program.threads), stdout=log, stderr=log, pass_fds=(lock.fileno(),)
        )
        told = len(progress(read_log(run)))
        try:
            while process.poll() is None and not stop.requested:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
                lines = progress(read_log(run))
                for line in lines[told:]:
                    say(f"{run.name}  {line}")
                told = len(lines)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if stop.requested:
        raise Stopped(f"{run}: stopped; the same command goes on after what was whole")
    if process.returncode:
        said = read_log(run).strip().splitlines() or [""]
        raise RunError(f"{path}: {program.name} {command} failed ({process.returncode}): {said[-1][:300]}")


def read_log(run: Path) -> str:
    """What a run's programs have said until now."""
    path = run / "log.txt"
    return path.read_text(errors="replace") if path.exists() else ""
