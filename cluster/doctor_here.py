"""All checks of `doctor` that one machine can answer, asked at the same time."""

import os
from pathlib import Path
from typing import Any

from cluster import doctor_machine, doctor_places, doctor_slurm
from cluster.doctor_tools import Check, Probe, ask_all, verdict
from spire_dist.config import RunConfig, load_config
from spire_dist.errors import ConfigError, SpireError

EXAMINE_S = 90.0
"""The slowest finding, torch from a cold network file system, takes most of it; usually it is 3 s."""


def read_config(path: Path | None) -> tuple[RunConfig | None, list[Check]]:
    """The configuration, or the finding that it cannot be used."""
    if path is None:
        return None, []
    try:
        return load_config(path), []
    except ConfigError as error:
        return None, [Check("configuration", "MISS", str(error), "mend the file; docs/config.md lists all settings")]


def nodes_of_job() -> int:
    """Nodes of the Slurm job this process is in, else 1."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", 1))


def examine_here(
    config: RunConfig | None, run: Path, nodes: int | None, facts: dict[str, Any] | None = None
) -> list[Check]:
    """Findings about this machine, for a run on so many `nodes`; None: on several, which will compare what they see.

    `facts` are torch's, where they were asked for before.
    """
    extras = {"deepspeed"} if config and config.parallel.engine == "deepspeed" else set[str]()
    extras |= {"ray"} if config and config.data.loader == "ray" else set()

    def graphics() -> list[Check]:
        known = facts or doctor_machine.ask_torch()
        wanted = config is not None and config.device == "cuda"
        checks = doctor_machine.gpus(known, doctor_machine.gpus_of_machine(), os.environ, wanted)
        return checks + doctor_machine.limits(bool(known.get("gpus")))

    probes: dict[str, Probe] = {
        "Python": doctor_machine.python,
        "packages": lambda: doctor_machine.packages(frozenset(extras)),
        "own packages": doctor_machine.own_packages,
        "GPUs": graphics,
        "file system": lambda: doctor_places.file_system(run, nodes),
        "own name": lambda: doctor_places.names(os.environ, nodes or nodes_of_job()),
        "Slurm": lambda: doctor_slurm.slurm(os.environ, config.job if config else None),
    }
    if config is not None:
        probes["store"] = lambda: check_config(config)
    return ask_all(probes, EXAMINE_S)


def check_config(config: RunConfig) -> list[Check]:
    """Whether a run can start with these settings: number of ranks, the store, memory for it."""
    from spire_dist.data.resident import SHARE, free_memory
    from spire_dist.data.store import ParticleStore

    ranks = config.job.nodes * config.job.tasks_per_node
    found = f"{ranks} rank(s): job.nodes {config.job.nodes} × job.tasks_per_node {config.job.tasks_per_node}"
    fix = f"choose a parallel.gauss that divides {ranks}"
    good = ranks % config.parallel.gauss == 0
    checks = [verdict(good, "configuration", found if good else f"{found}; parallel.gauss = {config.parallel.gauss} does not "
                      "divide them", fix, "MISS")]  # fmt: skip
    try:
        store = ParticleStore.open(config.data.store)
    except SpireError as error:
        fix = "make it with spire-dist prep, or correct data.store (a relative path starts where you are)"
        return [*checks, Check("store", "MISS", str(error), fix)]
    if not store.has_poses:
        return [*checks, Check("store", "MISS", f"{store.path} has no poses", "prepare it from a file with poses")]
    size, free = store.count * store.box**2 * store.images.dtype.itemsize, free_memory()
    found = (
        f"{store.count:,} images of {store.box} px, {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB of memory free here"
    )
    if config.data.resident == "always":
        copies = config.job.tasks_per_node * size
        fix = "set data.resident = 'auto'"
        checks.append(verdict(copies < free, "store", f"{found}; a copy for each rank", fix, "MISS"))
    else:
        fits = config.data.resident == "auto" and config.job.tasks_per_node == 1 and size <= SHARE * free
        checks.append(Check("store", "OK", f"{found}: {'kept in memory' if fits else 'streamed'}"))
    return checks
