"""A Slurm cluster of several nodes on this machine: real daemons, real signals, without systemd or control groups.

Plain nodes share the network and the name of this machine. Walled nodes have their own of both (network namespaces; as
administrator only), so that their link can be cut. `keeper.py` removes all of it in the end.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster import keeper

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended.log
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={node_timeout_s}
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
KillWait=10
Waittime=0
MinJobAge=3600
JobRequeue=1
UnkillableStepTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=2,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=00:00:00
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
{more}
"""
CORES = (
    "CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:2 State=UNKNOWN"
)
"""What each node claims to be. Slurm never opens its GPUs, so that any device will do."""
NODE_PORT = 6818
"""Of a walled node, which has all ports for itself."""
SUBNETS = range(256)


@dataclass
class Lab:
    """A running cluster; `SLURM_CONF` is what Slurm's commands need in their environment to find it."""

    folder: Path
    node_timeout_s: int
    conf: Path = field(init=False)
    bridge: str = ""
    """Of walled nodes."""
    nodes: dict[str, subprocess.Popen] = field(default_factory=dict)
    """slurmd of each; of a walled node the process that ends with all of the node's."""

    def __post_init__(self) -> None:
        self.conf = self.folder / "slurm.conf"

    # ---- jobs

    def sbatch(self, *words: object) -> str:
        """Submit, and return the job's id."""
        command = ["sbatch", "--parsable", *map(str, words)]
        result = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`: JobState, Restarts, ExitCode ("75:0"), NodeList, Reason and many more."""
        words = self.output("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.show(job).get("JobState", "")

    def wait(self, job: str, *states: str, restarts: int = 0, timeout_s: float = 120.0) -> dict[str, str]:
        """Until the job is in one of the states, having been queued again so often at least."""
        found: dict[str, str] = {}

        def reached() -> bool:
            nonlocal found
            found = self.show(job)
            return found.get("JobState") in states and int(found["Restarts"]) >= restarts

        wait_until(reached, timeout_s, lambda: f"{states} wanted of {found}\n{self.log()}")
        return found

    def history(self, job: str) -> list[str]:
        """How each life of the job that is over has ended, in Slurm's words."""
        path = self.folder / "ended.log"
        records = path.read_text().splitlines() if path.exists() else []
        fields = [dict(word.split("=", 1) for word in record.split() if "=" in word) for record in records]
        return [record["JobState"] for record in fields if record["JobId"] == job]

    def scancel(self, *words: str) -> None:
        """End a job, or signal its tasks: `scancel("--signal=USR2", job)`."""
        self.output("scancel", *words)

    def processes(self, node: str | None = None, word: str = "") -> list[psutil.Process]:
        """What jobs have running, on one node or on all, with `word` among the words of the command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != str(self.conf) or "SLURMD_NODENAME" not in environment:
                    continue
                if node in (None, environment["SLURMD_NODENAME"]) and (not word or word in process.cmdline()):
                    found.append(process)
        return found

    # ---- nodes

    def kill_node(self, name: str) -> None:
        """Nobody of the node is left to report anything: slurmd, its stepds, their tasks."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        if self.bridge:
            # All in its process namespace are killed with it, but on a busy machine not before this returns.
            wait_until(lambda: not self.processes(name))
        else:
            keeper.end_node(self.folder, name)

    def start_node(self, name: str) -> None:
        """Start a node, or start it again."""
        command = ["slurmd", "-D", "-N", name, "-f", str(self.conf)]
        if self.bridge:
            enter = (
                f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; "
                f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf; exec {' '.join(command)}"
            )
            own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            command = ["ip", "netns", "exec", f"{self.bridge}-{name}", *own, "sh", "-c", enter]
        self.nodes[name] = self._start(f"slurmd-{name}", command)

    def wait_for_nodes(self, *names: str, state: str = "idle", timeout_s: float = 60.0) -> None:
        """Until these nodes (by default all) are in a state: idle, down, alloc, mix."""
        wanted = [f"{name} {state}" for name in sorted(names or self.nodes)]
        ask = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t"]
        ask += [f"--nodes={','.join(names or self.nodes)}"]
        wait_until(lambda: sorted(self.output(*ask).splitlines()) == wanted, timeout_s, self.log)

    def cut(self, name: str) -> None:
        """Take a walled node off the network; all that runs there runs on."""
        self._ip(f"link set {self.bridge}{name} down")

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        self._ip(f"link set {self.bridge}{name} up")

    # ---- making it

    def environment(self) -> dict[str, str]:
        """This process's, with the way to the cluster."""
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def output(self, *command: str) -> str:
        """What a command writes, empty where it fails."""
        return subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=False
        ).stdout.strip()

    def log(self) -> str:
        """The last lines of the controller's log, for the message of a test that failed."""
        path = self.folder / "slurmctld.log"
        return "\n".join(path.read_text().splitlines()[-30:]) if path.exists() else ""

    def start_controller(self) -> None:
        """munged and slurmctld."""
        key, socket_path = self.folder / "munge.key", self.folder / "munge.sock"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munged = ["munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={key}"]
        munged += [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("log", "pid", "seed")]
        self._start("munged", munged, socket_path.exists)
        controller = ["slurmctld", "-D", "-f", str(self.conf)]
        self._start("slurmctld", controller, lambda: "is UP" in self.output("scontrol", "ping"))

    def write_files(self, names: Sequence[str], more: str) -> None:
        """The configuration of nodes with these names, with further lines."""
        for sub in ("state", *(f"spool-{name}" for name in names)):
            (self.folder / sub).mkdir()
        subnet = f"10.77.{self.bridge.removeprefix('lab')}"
        lines = []
        for number, name in enumerate(names, start=1):
            address = f"NodeHostname={name} NodeAddr={subnet}.{number} Port={NODE_PORT}"
            if not self.bridge:
                address = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(f"NodeName={name} {address} {CORES}")
        port = free_port()
        self.conf.write_text(
            SLURM_CONF.format(
                host=socket.gethostname().split(".")[0],
                address=f"{subnet}.254" if self.bridge else "127.0.0.1",
                port=port,
                user=psutil.Process().username(),
                folder=self.folder,
                first_job=1 + 100 * (port % 97),  # ranks meet at a port that the job's id chooses
                node_timeout_s=self.node_timeout_s,
                nodes="\n".join(lines),
                more=more,
            )
        )
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = [f"{subnet}.{number} {name}" for number, name in enumerate(names, start=1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")

    def make_network(self, names: Sequence[str]) -> None:
        """A bridge of this machine, and a namespace for each node with a cable to it."""
        for number in SUBNETS:
            if self._ip(f"link add lab{number} type bridge", check=False):
                self.bridge = f"lab{number}"
                break
        assert self.bridge, "no bridge can be made"
        (self.folder / "network").write_text(" ".join([self.bridge, *names]))
        subnet = f"10.77.{self.bridge.removeprefix('lab')}"
        self._ip(f"addr add {subnet}.254/24 dev {self.bridge}", f"link set {self.bridge} up")
        for number, name in enumerate(names, start=1):
            space, cable = f"{self.bridge}-{name}", f"{self.bridge}{name}"
            self._ip(
                f"netns add {space}",
                f"link add {cable} type veth peer name eth0 netns {space}",
                f"link set {cable} master {self.bridge} up",
                f"-n {space} addr add {subnet}.{number}/24 dev eth0",
                f"-n {space} link set eth0 up",
                f"-n {space} link set lo up",
            )

    def _ip(self, *commands: str, check: bool = True) -> bool:
        results = [
            subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False) for words in commands
        ]
        wrong = [result.stderr for result in results if result.returncode]
        assert not (check and wrong), wrong
        return not wrong

    def _start(self, name: str, command: Sequence[str], ready: Callable[[], bool] = lambda: True) -> subprocess.Popen:
        log = self.folder / f"{name}.out"
        with log.open("wb") as out:
            # A session of its own: Ctrl-C is not for daemons.
            process = subprocess.Popen(command, env=self.environment(), stdout=out, stderr=out, start_new_session=True)
        wait_until(lambda: process.poll() is not None or ready(), 60.0, log.read_text)
        assert process.poll() is None, log.read_text()
        return process


@contextmanager
def slurm_lab(nodes: int, *, walled: bool = False, node_timeout_s: int = 10, more: str = "") -> Iterator[Lab]:
    """A cluster of nodes n1, n2, ... with partitions main and high; jobs in high preempt those in main.

    `node_timeout_s` is how long Slurm waits for a silent node; `more` are further lines of slurm.conf.
    """
    names = [f"n{number}" for number in range(1, nodes + 1)]
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # paths of Unix sockets are short, pytest's folders are not
    guard = subprocess.Popen([sys.executable, keeper.__file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    lab = Lab(folder, node_timeout_s)
    try:
        if walled:
            lab.make_network(names)
        lab.write_files(names, more)
        lab.start_controller()
        for name in names:
            lab.start_node(name)
        lab.wait_for_nodes()
        yield lab
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0, told: Callable[[], str] = str) -> None:
    """Look every tenth of a second; `told` is called for the message of the failure."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain\n{told()}"
        time.sleep(0.1)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
