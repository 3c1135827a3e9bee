"""Clusters for the tests: Ray of this machine, and a real Slurm of several nodes (`lab.py`)."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, slurm_lab

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "ip": "iproute2"}
"""Program and the Debian package it comes from."""

os.environ |= {"RAY_AUTH_TOKEN": "of-the-tests", "RAY_AUTH_MODE": "token"}
"""Ray looks when it is first imported, and would leave a token in the home directory."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files of long tests come first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: not hasattr(item.module, "pytestmark"))


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Address of a Ray cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    """Slurm's programs are here, so that a test can make a lab of its own."""
    install_programs()


@pytest.fixture(scope="module")
def slurm(slurm_installed) -> Iterator[Lab]:
    """A Slurm of two nodes; its commands work inside a test that asks for this, and jobs see what the test sees."""
    with slurm_lab(2) as lab, commands_find(lab):
        yield lab


@pytest.fixture(scope="module")
def walled_slurm(slurm_installed) -> Iterator[Lab]:
    """A Slurm of three nodes, each of which has its own name and can be cut off the network."""
    if os.geteuid() != 0:
        pytest.skip("needs to be root, to make network namespaces")
    with slurm_lab(3, walled=True, node_timeout_s=3) as lab, commands_find(lab):
        yield lab


@contextmanager
def commands_find(lab: Lab) -> Iterator[None]:
    """Inside the block this process's Slurm is the lab."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        yield


def install_programs(attempts: int = 3) -> None:
    """Skip where Slurm is not installed and cannot be."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with open(Path(tempfile.gettempdir()) / "spire-tests-install.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be at it
            for attempt in range(attempts):
                packages = missing_packages()
                if not packages:
                    break
                time.sleep(10 * attempt)  # anybody else's apt may hold its locks
                environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
                for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                    words = ["apt-get", "-o", "DPkg::Lock::Timeout=120", *command]
                    subprocess.run(words, env=environment, capture_output=True, timeout=300, check=False)
    if missing_packages():
        pytest.skip(f"needs a Slurm to start: apt-get install {' '.join(missing_packages())}")


def missing_packages() -> list[str]:
    """Packages whose program is not here."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
