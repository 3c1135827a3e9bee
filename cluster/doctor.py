"""`spire-dist doctor`: what a cluster gets wrong, each finding OK, WARN or MISS, with its fix.

`examine` looks at this machine, at Slurm, and at a configuration and the place of a run where they are given. Under `srun` with
several tasks every node is examined, the ranks meet as they do for training, and the first one tells for all.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.doctor_here import examine_here, nodes_of_job, read_config
from cluster.doctor_places import ports
from cluster.doctor_tools import Check

__all__ = ["Check", "as_json", "examine", "table"]


def examine(config: Path | None = None, run: Path | None = None) -> list[Check]:
    """All findings, at the latest after a few minutes; in a step of several tasks those of all, on the first one.

    The other tasks return nothing, or the reason why they could not reach the first.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    # An interactive step has the job's number of tasks in SLURM_NTASKS, and runs one.
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", tasks)) > 1:
        from cluster.doctor_ranks import examine_together

        return examine_together(config, run)
    settings, wrong = read_config(config)
    nodes = max(nodes_of_job(), settings.job.nodes if settings else 1)
    found = examine_here(settings, run or Path("run"), nodes) + ports(os.environ) + wrong
    if tasks > 1:
        fix = "srun spire-dist doctor"
        found.append(Check("ranks", "WARN", f"a job of {tasks} tasks, of which only this process was examined", fix))
    return found


def table(checks: Sequence[Check]) -> str:
    """For people: a line per finding, its fix below, and the count at the end; nothing where there is none."""
    if not checks:
        return ""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.level:<4}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  fix: {check.fix}")
    counts = Counter(check.level for check in checks)
    return "\n".join([*lines, "", ", ".join(f"{counts[level]} {level}" for level in ("OK", "WARN", "MISS"))])


def as_json(checks: Sequence[Check]) -> str:
    """For programs: a list of objects with name, level, found and fix."""
    return json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False)
