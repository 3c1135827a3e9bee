"""Which ranks there are and which work together: the mesh `replicate × gauss`, from srun, torchrun or one process alone.

Rank r has the place (r // G, r % G). The G ranks of a gauss group hold a share of the Gaussians each and render them for the
images of the whole group; being neighbours, they lie within a node where G divides the ranks of one. The R ranks of a
replicate group hold the same share and see different images. One process alone has no groups, and every collective
(`collectives.py`) is then the identity: the code around them is the same.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spire_dist.distributed.pulse import Pulse
from spire_dist.errors import ConfigError, RankLostError, SpireError
from spire_dist.machine import first_node

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch and DeepSpeed read; torchrun sets them, under srun we do."""
DEFAULTS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
PORTS = range(20000, 30000)
"""For the meeting of a Slurm job's ranks; the job's number chooses."""


@dataclass(frozen=True)
class Mesh:
    """A rank's place among `world` ranks, `gauss` of which share the Gaussians."""

    rank: int = 0
    world: int = 1
    gauss: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    axes: DeviceMesh | None = None
    """None for one process alone."""
    all_ranks: DeviceMesh | None = None
    """The same ranks in one line."""
    pulse: Pulse | None = None
    """Tells whether the others live; where there are others."""

    @property
    def replicate(self) -> int:
        """R: groups that hold all Gaussians."""
        return self.world // self.gauss

    @property
    def gauss_rank(self) -> int:
        """Which share of the Gaussians this rank holds."""
        return self.rank % self.gauss

    def line(self, axis: Literal["gauss", "world"]) -> DeviceMesh:
        """The ranks along which a tensor's rows are divided, as DTensor wants them."""
        assert self.axes is not None
        assert self.all_ranks is not None
        return self.axes["gauss"] if axis == "gauss" else self.all_ranks

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """All ranks."""
        return None if self.axes is None else dist.group.WORLD

    @property
    def gauss_group(self) -> dist.ProcessGroup | None:
        """The ranks that render the same images."""
        return None if self.axes is None else self.axes.get_group("gauss")

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same Gaussians."""
        return None if self.axes is None else self.axes.get_group("replicate")


@contextmanager
def init_distributed(gauss: int, device: str, timeout_s: float, groups: bool = False) -> Iterator[Mesh]:
    """The mesh of the ranks that were started together, for as long as the block lasts.

    Args:
        gauss: G, ranks that share the Gaussians.
        device: "cuda" (each rank takes the GPU of its number on the machine; NCCL) or "cpu" (gloo).
        timeout_s: how long a rank waits for the others before it gives up.
        groups: groups also for one process alone, which DeepSpeed wants.

    Raises ConfigError where `gauss` does not divide the ranks, or a rank has no GPU; RankLostError, which names the ranks,
    where others have died or hang.

    """
    launched = launch_variables(os.environ)
    world, rank, local_rank = (int(launched.get(name, default)) for name, default in DEFAULTS.items())
    if world % gauss:
        raise ConfigError(f"parallel.gauss = {gauss}: does not divide the {world} rank(s) of this run")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        own = gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ  # Slurm shows each task its own one only
        if local_rank >= gpus and not own:
            raise ConfigError(
                f"rank {rank}: number {local_rank} of its machine, which has {gpus} GPU(s); start one rank for each"
            )
        torch.cuda.set_device(0 if own else local_rank)
    if world == 1 and not groups:
        yield Mesh()
        return
    os.environ |= launched or _place_alone()
    store, hosted_by = _meeting_place(rank, world, timedelta(seconds=timeout_s))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), store=store, rank=rank, world_size=world)
        pulse = Pulse(rank, world, hosted_by, timeout_s) if world > 1 else None
        axes = init_device_mesh(device, (world // gauss, gauss), mesh_dim_names=("replicate", "gauss"))
    except RuntimeError as error:
        raise RankLostError(
            f"rank {rank}: the {world} ranks did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
            f"{timeout_s:g} s ({_first_line(error)}); see whether all were started"
        ) from error
    try:
        yield Mesh(rank, world, gauss, local_rank, axes, init_device_mesh(device, (world,)), pulse)
        dist.barrier()  # the first rank, which may keep the store, leaves last
    except BaseException as error:
        if pulse is None:
            raise
        if not _of_the_network(error):
            pulse.leave(
                str(error) if isinstance(error, SpireError) else f"{type(error).__name__}: {_first_line(error)}"
            )
            raise
        lost = RankLostError(f"rank {rank}: {pulse.who_is_missing()} ({_first_line(error)})")
        pulse.leave(str(lost))
        raise lost from error
    finally:
        if pulse is not None:
            pulse.stop()
        dist.destroy_process_group()


def _place_alone() -> dict[str, str]:
    """What a launcher would have set for one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        values = "0", "1", "0", "localhost", str(free.getsockname()[1])
    return dict(zip(LAUNCH_VARIABLES, values, strict=True))


def _meeting_place(rank: int, world: int, timeout: timedelta) -> tuple[Store, str]:
    """Where ranks find each other, and who keeps it.

    torchrun may keep it for them, and then for all its restarts: there, what the dead wrote must not be read.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, world, rank == 0 and not of_torchrun, timeout, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_torchrun else "0"
    return PrefixStore(f"attempt{attempt}", store), "torchrun" if of_torchrun else "rank 0"


def _of_the_network(error: BaseException) -> bool:
    """Whether a collective failed, and not this rank itself: gloo has no name of its own for it."""
    words = ("gloo", "Gloo", "NCCL")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def _first_line(error: BaseException) -> str:
    """Without the place in gloo's source."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[/[^]]*\]\s*", "", line)[:120]


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The five variables of `LAUNCH_VARIABLES`, from torchrun or from srun; none for a process that was started alone.

    A Slurm batch script is such a process: only srun starts ranks. Raises ConfigError where torchrun's are incomplete.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in environment:
        missing = [name for name in LAUNCH_VARIABLES if name not in environment]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE = {environment['WORLD_SIZE']}: {', '.join(missing)} not set; start with torchrun or srun"
            )
        return {name: environment[name] for name in LAUNCH_VARIABLES}
    # An interactive step of one task has the job's number of tasks in SLURM_NTASKS.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" in environment and int(tasks) > 1:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
        port = PORTS[int(environment.get("SLURM_JOB_ID", 0)) % len(PORTS)]
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR", first_node(nodes)),
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
            "LOCAL_WORLD_SIZE": str(_tasks_here(environment)),
        }
    return {}


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Ranks on this node by Slurm's list of them, "4(x2),3" for 4, 4 and 3."""
    counts: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, nodes = entry.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", 0)) % len(counts)]
