"""What a measurement is made on. Called by every benchmark, so that no number stands without it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from spire_dist import __version__
from spire_dist.machine import cores

PACKAGES = ("torch", "numba", "numpy", "spire-dist")


def describe_machine(threads: int = 0) -> dict:
    """Processor, cores this process may use, threads used (0: all cores), GPU, load, and versions; ready for JSON."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": threads or cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
    return __version__ if name == "spire-dist" else version(name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
