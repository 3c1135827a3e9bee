"""What Slurm's queue says of jobs, asked once for all of them."""

import shutil
import subprocess
from collections.abc import Iterable

PATIENCE_S = 5.0
"""A busy controller must not hold up who only wants to look."""

GONE = "gone"


def look(jobs: Iterable[str]) -> dict[str, str] | None:
    """How each job is: "PENDING (Priority)", "RUNNING (n[1-2])", or `GONE` where the queue does not know it any more.

    None where there is nothing to ask for, no Slurm, or no answer in `PATIENCE_S`.
    """
    wanted = sorted({job.partition("_")[0] for job in jobs})
    if not wanted or shutil.which("squeue") is None:
        return None
    try:
        # %R is the reason of a pending job and the nodes of one that runs; %F one number for all of an array.
        told = subprocess.run(
            ["squeue", "--noheader", "--format=%F|%T|%R", f"--jobs={','.join(wanted)}"],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told.returncode != 0 and "Invalid job id" not in told.stderr:
        return None
    found = dict.fromkeys(wanted, GONE)
    for line in told.stdout.splitlines():
        job, state, why = (*line.split("|", 2), "", "")[:3]
        why = why.strip("()")
        found[job] = f"{state} ({why})" if why not in ("", "None") else state
    return found
