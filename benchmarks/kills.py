"""Does a prep that is killed at any moment end in the same bytes? KILL at random moments, then the same command again.

    python -m benchmarks.kills OUT [--kills 50]

Each time a new store is begun by the command line with two worker processes, the command is killed (KILL, which nothing
can catch) after a random share of the time that an unbroken one takes, and run again to its end; one that ended before it
could be killed is not counted. What counts as the same: every file of the store, by name and content.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import describe_machine, machine_line
from benchmarks.preparation import make_particles
from benchmarks.tables import table, write
from spire_dist.progress import progress
from spire_dist.schema import MANIFEST_NAME


def main(
    out: Annotated[Path, typer.Argument(help="Folder for data and results.")],
    kills: Annotated[int, typer.Option(help="How often to kill.")] = 50,
    particles: Annotated[int, typer.Option(help="Images of 64 px.")] = 81920,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill, go on, compare; print how far the killed ones had come."""
    star, _ = make_particles(out / "input", particles, 64)
    for _ in "ab":  # the second without compiling kernels
        shutil.rmtree(out / "whole", ignore_errors=True)
        start = time.perf_counter()
        subprocess.run(command(star, out / "whole"), check=True, capture_output=True)
        seconds = time.perf_counter() - start
    expected = contents(out / "whole")
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in progress(range(kills), "kills"):
        outcome = None
        while outcome is None:
            outcome = kill_and_go_on(star, out / "store", rng.uniform(0, seconds), expected)
        outcomes.append(outcome)
    counts = Counter(stage for stage, _ in outcomes)
    same = sum(good for _, good in outcomes)
    machine = describe_machine()
    lines = [
        f"{same} of {kills} killed preparations ended in the same {len(expected)} files, byte for byte; an unbroken one took "
        f"{seconds:.1f} s",
        machine_line(machine),
        "",
        *table(["what stood when it was killed", "times"], [[name, str(number)] for name, number in counts.items()]),
    ]
    print("\n".join(lines))
    write(out, "kills", {"machine": machine, "same": same, "kills": kills, "stages": counts}, lines)
    if same < kills:
        raise typer.Exit(1)


def kill_and_go_on(star: Path, store: Path, after_s: float, expected: dict[str, str]) -> tuple[str, bool] | None:
    """(what stood when the command was killed, whether it ended in the expected files when run again); None: not killed."""
    shutil.rmtree(store, ignore_errors=True)
    process = subprocess.Popen(command(star, store), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        process.wait(after_s)
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stage = describe(store)
    subprocess.run(command(star, store), check=True, capture_output=True)
    return stage, contents(store) == expected


def describe(store: Path) -> str:
    """How far a store is."""
    if not store.exists():
        return "nothing yet"
    notes = len(list((store / ".prep").glob("shard-*")))
    return "a finished store" if (store / MANIFEST_NAME).exists() else f"{notes} shards"


def command(star: Path, store: Path) -> list[str]:
    """The command line that is killed."""
    arguments = ["prep", str(star), str(store), "--images-per-shard", "4096", "--workers", "2"]
    return [sys.executable, "-m", "spire_dist.cli", *arguments]


def contents(store: Path) -> dict[str, str]:
    """Name -> sha256 of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    typer.run(main)
