"""Clusters for the tests: Ray of this machine, and a real Slurm of one node, without systemd or control groups."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
"""Program and the Debian package it comes from."""

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=2
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs=4 CoresPerSocket=4 RealMemory=64000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """Ray would leave a token in the home directory, and a process knows only the first it meets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "of-the-tests")
        yield


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Address of a Ray cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """Slurm's commands work inside a test that asks for this; jobs see what the test sees."""
    install_programs()
    # Paths of Unix sockets are short, pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        for sub in ("state", "spool"):
            (folder / sub).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        user, host = psutil.Process().username(), socket.gethostname().split(".")[0]
        ports = {"controller_port": free_port(), "node_port": free_port()}
        conf = folder / "slurm.conf"
        conf.write_text(SLURM_CONF.format(host=host, user=user, folder=folder, **ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        patch.setenv("SLURM_CONF", str(conf))
        munge = [
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}"),
            *(f"--{kind}-file={folder}/munged.{kind}" for kind in ("log", "pid", "seed")),
        ]
        with (
            daemon(folder, munge, lambda: (folder / "munge.sock").exists()),
            daemon(folder, ["slurmctld", "-D", "-f", conf], lambda: "is UP" in output("scontrol", "ping")),
            daemon(
                folder, ["slurmd", "-D", "-N", "n1", "-f", conf], lambda: "idle" in output("sinfo", "-h", "-o", "%T")
            ),
        ):
            yield
            subprocess.run(["scancel", "--user", user.split("\\")[-1]], check=False)
            wait_until(lambda: output("squeue", "--noheader") == "")


def install_programs() -> None:
    """Skip where Slurm is not installed and cannot be."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        install = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(missing)}"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(install, shell=True, env=environment, capture_output=True, timeout=300, check=False)
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs a Slurm to start: apt-get install {' '.join(PROGRAMS.values())} (no {missing[0]} here)")


@contextmanager
def daemon(folder: Path, command: list[str | Path], ready: Callable[[], bool]) -> Iterator[None]:
    """A program that runs inside the block, and not longer than this process."""
    log = folder / f"{command[0]}.out"
    with log.open("wb") as out:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], stdout=out, stderr=out)
    try:
        wait_until(lambda: process.poll() is not None or ready())
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(20)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
