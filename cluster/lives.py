"""The lives of a Slurm job: what is told of them in the run directory, and what Slurm says of the present one.

jobs/job.json     {"id", "cluster", "time"} of the newest job
jobs/lives.jsonl  a record when a life starts and when it ends: job, restart, nodes; code, why, what comes next
jobs/4711-2.claim which task decided how the second restart ends
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any


def note(jobs: Path, event: str, **what: object) -> None:
    """Add to the record of the job's lives."""
    record = {"time": round(time.time(), 2), "job": os.environ["SLURM_JOB_ID"]}
    record |= {"restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "event": event} | what
    with (jobs / "lives.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lives(run: Path) -> list[dict[str, Any]]:
    """The records of `jobs/lives.jsonl`, none where there is no such file; a line that is being written is left out."""
    try:
        lines = (run / "jobs" / "lives.jsonl").read_text().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def still_ours(job: str) -> bool:
    """False once Slurm is ending this life of the job, or another one has begun.

    To requeue a cancelled job would bring it back, and a cut-off node must not disturb the job's new life elsewhere.
    """
    if shutil.which("scontrol") is None:
        return True
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False).stdout
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return fields.get("JobState") == "RUNNING" and fields.get("Restarts") == restarts


def slurm_settings() -> dict[str, str]:
    """Slurm's configuration as far as `scontrol` tells it here."""
    if shutil.which("scontrol") is None:
        return {}
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    pairs = (line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}
