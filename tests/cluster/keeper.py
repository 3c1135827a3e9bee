"""Removes a lab when the process that made it ends, however that ends: daemons, jobs, networks and files.

Run as a program by `lab.py`, with the lab's folder; it waits at its standard input for the other end to be closed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def end_node(folder: Path, name: str) -> None:
    """Kill the jobs of a node so that nobody is left to report it: first the stepds, then their tasks."""
    log = str(folder / f"slurmd-{name}.log")
    _kill_all(lambda process: _is_stepd_of(process, log))
    _kill_all(lambda process: process.environ().get("SLURMD_NODENAME") == name and _is_of(process, folder))


def remove(folder: Path) -> None:
    """End all that belongs to the lab in `folder`, and delete it."""
    _kill_all(lambda process: _is_of(process, folder) or _is_stepd_of(process, str(folder)))
    if (folder / "network").exists():
        bridge, *names = (folder / "network").read_text().split()
        for command in (*(f"netns del {bridge}-{name}" for name in names), f"link del {bridge}"):
            subprocess.run(["ip", *command.split()], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return process.environ().get("SLURM_CONF") == str(folder / "slurm.conf")


def _is_stepd_of(process: psutil.Process, log: str) -> bool:
    """By the log that it holds open: its environment is gone, overwritten by its title."""
    return process.name() == "slurmstepd" and any(file.path.startswith(log) for file in process.open_files())


def _kill_all(chosen: Callable[[psutil.Process], bool]) -> None:
    """Kill, and look again, until nobody is left; a process may have had a child meanwhile."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid() and chosen(process):
                    process.kill()
                    found.append(process)
        if not found:
            return
        psutil.wait_procs(found, timeout=1)


if __name__ == "__main__":
    sys.stdin.read()
    remove(Path(sys.argv[1]))
