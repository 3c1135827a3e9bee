"""In what state a run is, and of which job: judged from its newest sign of life, the queue, and what it said last."""

from typing import Literal

from cluster.alarms import STALE_S, beat_age
from cluster.run_files import RunFiles, moment

State = Literal[
    "queued", "starting", "training", "suspended", "stopped", "failed", "complete", "STUCK", "no sign of life"
]

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
STARTING = ("RUNNING", "CONFIGURING")
"""Slurm's names for a job that will run, and for one that has its nodes."""

START_S = 120.0
"""A life of a job may take so long before its first sign of life."""

QUIET_S = 600.0
"""So long a run without signs of life (of an older version) is believed to train."""


def life_state(files: RunFiles, stuck: bool, queue: str | None, now: float) -> State:
    """The newest sign of life counts first, then the queue, then what the run said last."""
    told, age, waiting_for = files.status.get("state"), beat_age(files, now), (queue or "").partition(" ")[0]
    if told == "complete":
        return "complete"
    if waiting_for == "SUSPENDED":
        return "suspended"
    if age is not None and age <= STALE_S and not _ended_since(files):
        return "STUCK" if stuck else "training" if told == "training" else "starting"
    if waiting_for in WAITING or (queue is None and _comes_again(files)):
        return "queued"
    if waiting_for in STARTING and _starts(files, now):
        return "starting"
    if told == "stopped" or told == "failed":
        return told
    if told == "training":  # versions without signs of life say something only when they log or save
        news = max((time for time in (moment(files.newest), moment(files.status)) if time is not None), default=0.0)
        return "training" if age is None and now - news <= QUIET_S else "no sign of life"
    return "queued" if files.job and queue is None else "no sign of life"


def _comes_again(files: RunFiles) -> bool:
    """Whether the newest life ended with a request for another one."""
    return bool(files.lives) and files.lives[-1].get("then") == "requeued"


def _ended_since(files: RunFiles) -> bool:
    """Whether the run has said that it ended after the last sign of the rank that says so; others may outlive it a little."""
    ended, first = moment(files.status), files.beats.get(0)
    if files.status.get("state") not in ("stopped", "failed") or ended is None:
        return False
    return first is None or first["time"] <= ended + 1  # it is written in whole seconds


def _starts(files: RunFiles, now: float) -> bool:
    """Whether a job that runs is at its beginning, and not at the end of what the run has told of."""
    began = max((moment(life) or 0.0 for life in files.lives if life.get("event") == "started"), default=None)
    if files.status.get("state") == "training":
        return began is not None and now - began <= START_S
    return began is None or began > (moment(files.status) or 0.0)


def newest_job(files: RunFiles) -> str | None:
    """The newest job: submit knows of it first, each life and each rank after it."""
    known = [(moment(files.job), files.job.get("id"))]
    known += [(moment(record), record.get("job")) for record in (*files.lives, *files.beats.values())]
    jobs = [(time, str(job)) for time, job in known if time is not None and job is not None]
    return max(jobs)[1].partition("_")[0] if jobs else None


def slurm_job(files: RunFiles) -> str | None:
    """The newest job, where the queue may know it."""
    job = newest_job(files)
    local = files.job.get("cluster") == "local" and str(files.job.get("id")).partition("_")[0] == job
    return job if job is not None and job.isdigit() and not local else None
