"""cryoDRGN beside ours: a program of its own environment, only ever run as a separate process.

    python3 -m venv PEER && PEER/bin/pip install cryodrgn==4.3.1 torch==2.13.0

RUN/weights.N.pkl, z.N.pkl, config.yaml   its own, after every epoch
RUN/log.txt                               all it said, over restarts; epochs are timed by it
RUN/rival.json                            what it was started with
"""

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spire_dist import numpy_pickle
from spire_dist.comparison.layout import ParticleFiles
from spire_dist.comparison.methods import INSTALL, Rival
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import ConfigError, RunError, SourceError, Stopped
from spire_dist.files import write_json
from spire_dist.maps import read_map
from spire_dist.results.runs import read_json
from spire_dist.training.metrics import say

LOOK_SECONDS = 0.5
"""Between two looks at a process that works."""


@dataclass(frozen=True)
class Program:
    """An installed cryoDRGN."""

    python: Path
    threads: int
    version: str

    @property
    def command(self) -> Path:
        """The console script beside its Python."""
        return self.python.with_name("cryodrgn")


@dataclass(frozen=True)
class RivalModel:
    """A checkpoint as something that can be scored (`results.evaluate.Scorable`)."""

    run: Path
    epoch: int
    program: Program
    store: ParticleStore
    latents: NDArray[np.float32]
    """[N, L], in the store's row order."""
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
        """The maps at latents [B, L], decoded by one call of `eval_vol`."""
        with TemporaryDirectory(prefix=".maps-", dir=self.run) as folder:
            points, maps = Path(folder) / "z.txt", Path(folder) / "maps"
            np.savetxt(points, latents)
            start = [
                "eval_vol", self.run / f"weights.{self.epoch}.pkl", "-c", self.run / "config.yaml", "--zfile", points,
                "-o", maps, "--Apix", self.pixel_size, "--vol-start-index", 0,
            ]  # fmt: skip
            run_program(self.program, start, self.run)
            for number in range(len(latents)):
                yield read_map(maps / f"vol_{number:03d}.mrc")[0]


def find_program(python: Path, threads: int) -> Program:
    """The cryoDRGN of an environment's Python. Raises ConfigError where it has none."""
    return Program(python, threads, versions(python))


def versions(python: Path) -> str:
    """What is compared with, "cryoDRGN 4.3.1 (torch 2.13.0)". Raises ConfigError where the environment of `python` has none."""
    code = 'from importlib.metadata import version as v; print(f\'cryoDRGN {v("cryodrgn")} (torch {v("torch")})\')'
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{python}: no Python with cryoDRGN; {INSTALL} PEER/bin/python") from error


def environment(threads: int) -> dict[str, str]:
    """For its process: its own defaults, not ours (neither our modules nor how our threads wait), on `threads` threads."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
    return kept | {"OMP_NUM_THREADS": str(threads)}


def epoch_seconds(log: str) -> dict[int, float]:
    """Seconds of each epoch, from lines such as `# =====> Epoch: 2 Average gen loss = ...; Finished in 0:00:05.655847`."""
    found = re.findall(r"=> Epoch: (\d+) .*Finished in (\d+):(\d+):(\d+(?:\.\d+)?)$", log, flags=re.MULTILINE)
    return {int(epoch): 3600 * int(hours) + 60 * int(minutes) + float(s) for epoch, hours, minutes, s in found}


def train_rival(
    program: Program,
    method: Rival,
    files: ParticleFiles,
    store: ParticleStore,
    run: Path,
    *,
    seed: int,
    epochs: int,
    minutes: float | None,
) -> list[float]:
    """Train on the input of the store, or go on with what is there; returns the seconds of each epoch.

    With `minutes` as many whole epochs as fit into them by the time of the first, at least one, instead of `epochs`. Raises
    ConfigError or SourceError for what it cannot use, RunError where the program fails, Stopped on request.
    """
    if files.poses is None or files.ctf is None:
        raise SourceError(
            f"{files.particles}: combined_poses.pkl and combined_ctfs.pkl are not both there; cryoDRGN needs them"
        )
    start: list[Any] = [
        "train_vae",
        files.particles.resolve(),
        "--poses",
        files.poses.resolve(),
        "--ctf",
        files.ctf.resolve(),
    ]
    if files.particles.suffix.lower() == ".star":
        start += ["--datadir", files.particles.resolve().parent]
    if store.attributes["sign"]["applied"] < 0:  # its own default is right for images of bright protein
        start += ["--uninvert-data"]
    start += [*method.options, "--no-analysis", "--seed", seed, "-o", run.resolve()]
    _begin(run, {"options": method.options, "seed": seed, "particles": store.fingerprint, "version": program.version})
    if minutes is not None:
        _train_to(program, start, run, 1)
        epochs = max(1, int(60 * minutes / epoch_seconds(_log(run))[1]))
    _train_to(program, start, run, epochs)
    seconds = epoch_seconds(_log(run))
    return [seconds[epoch] for epoch in range(1, epochs + 1)]


def load_rival(program: Program, run: Path, epoch: int, store: ParticleStore) -> RivalModel:
    """The checkpoint after an epoch; its latents are in the order of the input file."""
    latents = np.asarray(numpy_pickle.load(run / f"z.{epoch}.pkl"), dtype=np.float32)
    if len(store.sources) > 1 or len(latents) <= store.source_index.max():
        raise RunError(f"{run}: latents of {len(latents)} images, the store has others; begin a new run")
    return RivalModel(run, epoch, program, store, latents[store.source_index])


def run_program(program: Program, words: Sequence[Any], run: Path) -> None:
    """Run one of its commands to the end, all it says going to log.txt; it stops with this process.

    Raises RunError with its last line where it fails or one is at work already, Stopped where a signal asked for it.
    """
    path = run / "log.txt"
    with StopFlag() as stop, open(path, "a") as log, open(run / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the process inherits, should this one be killed
        except BlockingIOError:
            raise RunError(f"{run}: cryoDRGN is at work here for another call; wait for it or stop it") from None
        process = subprocess.Popen(
            [program.command, *map(str, words)], env=environment(program.threads), stdout=log, stderr=log,
            pass_fds=(lock.fileno(),),
        )  # fmt: skip
        told = len(epoch_seconds(_log(run)))
        try:
            while process.poll() is None and not stop.requested:
                try:
                    process.wait(LOOK_SECONDS)
                except subprocess.TimeoutExpired:
                    told = _tell(run, told)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if stop.requested:
        raise Stopped(f"{run}: stopped; the same command goes on after the last whole epoch")
    if process.returncode:
        said = _log(run).strip().splitlines() or [""]
        raise RunError(f"{path}: cryodrgn {words[0]} failed ({process.returncode}): {said[-1][:300]}")


def whole_epochs(run: Path) -> int:
    """The last epoch whose checkpoint is whole; latents are written after the weights."""
    numbers = sorted(int(path.name.split(".")[1]) for path in run.glob("z.*.pkl") if path.name.count(".") == 2)
    for epoch in reversed(numbers):
        try:
            numpy_pickle.load(run / f"z.{epoch}.pkl")
        except SourceError:
            continue
        return epoch
    return 0


def _train_to(program: Program, start: Sequence[Any], run: Path, epochs: int) -> None:
    done = whole_epochs(run)
    if done >= epochs:
        return
    load = ["--load", run.resolve() / f"weights.{done}.pkl"] if done else []
    run_program(program, [*start, "-n", epochs, *load], run)


def _begin(run: Path, facts: dict[str, Any]) -> None:
    """A run goes on only with what it was started with."""
    known = read_json(run / "rival.json")
    for name, value in facts.items():
        if known and known.get(name) != value:
            now, before = json.dumps(value), json.dumps(known.get(name))
            raise RunError(f"{run}: started with {name} {before}, now {now}; use the same, or another --out")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "rival.json", facts)


def _log(run: Path) -> str:
    path = run / "log.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def _tell(run: Path, told: int) -> int:
    """Say which epochs have ended since `told` of them had."""
    seconds = epoch_seconds(_log(run))
    for epoch in list(seconds)[told:]:
        say(f"{run.name}  epoch {epoch}  {seconds[epoch]:.1f} s")
    return max(told, len(seconds))
