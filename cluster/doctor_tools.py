"""What the checks of `doctor` are made of: a finding, and ways to ask for one that cannot hang the asker.

A file server that is gone, a driver that is stuck or a resolver that is slow must cost seconds and not the answer. What may
hang in the kernel runs in a process of its own, everything else in a thread that nobody waits for.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Level = Literal["OK", "WARN", "MISS"]
Probe = Callable[[], "list[Check]"]

ROOT = Path(__file__).parents[1]
"""Where `cluster` and `spire_dist` are."""
PATIENCE_S = 10.0
"""How long one question may take; a group of them takes a few of these at most."""
NO_ANSWER = 124
NOT_FOUND = 127
"""Exit codes as a shell has them."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    level: Level
    """WARN: works, with a drawback. MISS: a run fails here."""
    found: str
    fix: str = ""
    """What to do, one line; empty where nothing is wrong."""


def verdict(good: bool, name: str, found: str, fix: str, bad: Level = "WARN") -> Check:
    """OK where it is good, else `bad` with the fix."""
    return Check(name, "OK", found) if good else Check(name, bad, found, fix)


class UnansweredError(Exception):
    """A question to another process that has failed or taken too long; its text says how."""


def ask_all(probes: Mapping[str, Probe], seconds: float) -> list[Check]:
    """What all probes find, in their order; they run at the same time, and one that is late or fails is a finding itself."""
    found: dict[str, list[Check]] = {}

    def ask(name: str, probe: Probe) -> None:
        try:
            found[name] = probe()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found[name] = [Check(name, "WARN", f"could not be checked ({reason})", "see whether it works by hand")]

    threads = {
        name: threading.Thread(target=ask, args=(name, probe), daemon=True, name=name) for name, probe in probes.items()
    }
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    late = [Check(name, "MISS", f"no answer within {seconds:g} s", "find out what hangs there") for name in threads]
    return [check for lost in late for check in found.get(lost.name, [lost])]


def within(seconds: float, call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, and the seconds it took. Raises TimeoutError where it takes too long, else what it raises."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except Exception as error:
            outcome.append((False, error))

    thread, start = threading.Thread(target=run, daemon=True), time.monotonic()
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    good, value = outcome[0]
    if not good:
        raise value
    return value, time.monotonic() - start


def run_command(
    *command: str, seconds: float = PATIENCE_S, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> tuple[int, str, str]:
    """Exit code, output and errors of a command; `NOT_FOUND` and `NO_ANSWER` in place of exceptions."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
            cwd=folder,
        )
    except OSError as error:
        return NOT_FOUND, "", f"{command[0]}: {error.strerror}"
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: what hangs in the kernel does not end
        return NO_ANSWER, "", f"{command[0]}: no answer within {seconds:g} s"
    return process.returncode, out.strip(), errors.strip()


def in_child(
    module: str, function: str, arguments: Sequence[Any] = (), *, seconds: float = PATIENCE_S, **variables: str
) -> Any:
    """What `module.function(*arguments)` returns in a process of its own, with further environment variables.

    Arguments and answer are JSON. Raises UnansweredError with its last words where it fails or takes too long.
    """
    code = (
        f"import json, sys; from {module} import {function} as asked; "
        "print(json.dumps(asked(*json.loads(sys.argv[1]))))"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    status, out, errors = run_command(
        # -P: a folder named cluster where the user happens to be is not ours
        *(sys.executable, "-P", "-c", code, json.dumps(arguments)),
        seconds=seconds,
        environment=os.environ | {"PYTHONPATH": path} | variables,
    )
    if status:
        raise UnansweredError(last_line(errors) or f"ended with exit code {status}")
    return json.loads(out.splitlines()[-1])


def last_line(text: str) -> str:
    """The last line that says something, as exceptions and many programs put it; at most 200 characters."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")
