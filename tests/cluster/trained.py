"""Real runs that train beside a test, and their end."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.run_states import RunState, read_state

ENDLESS = ["stage1.epochs=100000", "output.log_seconds=1", "output.report=false"]
"""`--set` values of a run that somebody else must end."""


@contextmanager
def training(folder: Path, wanted: Mapping[str, tuple[int, Sequence[str]]]) -> Iterator[None]:
    """Runs of `wanted`, name: (ranks, `--set` values), train in `folder` inside the block, and are killed at its end."""
    started = []
    try:
        for name, (ranks, values) in wanted.items():
            options = [option for value in values for option in ("--set", value)]
            command = [sys.executable, "-m", "spire_dist.cli", "train", "--run", folder / name]
            with open(folder / f"{name}.log", "w") as log:
                started.append(
                    subprocess.Popen([*command, "--processes", str(ranks), *options], stdout=log, stderr=log)
                )
        yield
    finally:
        for process in started:
            kill(process.pid)
            process.wait(30)


def kill(pid: int) -> None:
    """SIGKILL for a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def wait_for(run: Path, reached: Callable[[RunState], bool], patience_s: float) -> RunState:
    """The first state that is as wanted. Fails after `patience_s`, with the state and the log."""
    until = time.monotonic() + patience_s
    while not reached(state := read_state(run)):
        assert time.monotonic() < until, f"{state}\n{run.with_suffix('.log').read_text()}"
        time.sleep(0.2)
    return state


def trains(state: RunState) -> bool:
    """Whether it has logged a step."""
    return state.state == "training" and state.loss is not None
