"""What a measurement is made on. Called by every benchmark, so that no number stands without it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numba
import torch

from spire_dist.machine import cores

PACKAGES = ("torch", "numba", "numpy", "spire-dist")


def use_threads(threads: int) -> int:
    """The same number for torch and for the CPU projector; 0 takes all cores. Returns the number."""
    threads = threads or cores()
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    return threads


def describe_machine(threads: int = 0) -> dict:
    """Processor, cores this process may use, threads used (0: all cores), load, and versions; ready for JSON."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": threads or cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def machine_line(machine: dict) -> str:
    """The same in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load "
        f"{machine['load_average']}; Python {machine['python']}, {versions}"
    )


def _version(name: str) -> str:
    if name == "spire-dist":
        from spire_dist import __version__

        return __version__
    return version(name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
