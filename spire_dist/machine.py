"""What this process has of its machine: called wherever work is split among cores or between ranks."""

import os
import re


def cores() -> int:
    """Cores this process may use, which a batch system or a container may have limited where the system lets them."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count()  # type: ignore[attr-defined]
    elif hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return count or 1


def local_ranks() -> int:
    """Ranks on this node, this one among them, as torchrun and our own launcher tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_cores() -> int:
    """Cores for this rank: those that Slurm gave each task, else an equal share of the node's."""
    if "SLURM_STEP_ID" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(cores(), int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, cores() // local_ranks())


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes: "gpu[007-009,012],login" is "gpu007"."""
    match = re.match(r"([^,\[]*)(?:\[([^,\]-]*)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None  # every part of it may be empty
    return "".join(part or "" for part in match.groups())
