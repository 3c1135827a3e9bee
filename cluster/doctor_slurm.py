"""Checks of Slurm: its commands, munge, and what this site does when time is up, on preemption and when a node is lost."""

import re
import shutil
from collections.abc import Mapping

from cluster.doctor_tools import NO_ANSWER, Check, last_line, run_command, verdict
from spire_dist.config import JobConfig
from spire_dist.errors import Stopped

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
SHORT_GRACE_S = 30
"""A save and the agreement before it should fit in."""


def slurm(environment: Mapping[str, str], job: JobConfig | None) -> list[Check]:
    """Everything about Slurm, or one line where there is none."""
    there = [name for name in COMMANDS if shutil.which(name)]
    inside = "SLURM_JOB_ID" in environment
    if not there and not inside:
        return [Check("Slurm", "OK", "not on a Slurm machine")]
    status, out, errors = run_command("scontrol", "show", "config")
    checks = [_commands(there, inside)]
    if "scontrol" in there and status:
        if "configuration source" in errors:
            fix = "set SLURM_CONF, or ask the site how this machine is made a submit host"
            return [
                *checks,
                Check("Slurm controller", "WARN", "Slurm's commands are here, but no cluster's settings", fix),
            ]
        munge = _munge({})
        return (
            [*checks, munge, _controller(status, errors, munge)]
            if munge
            else [*checks, _controller(status, errors, None)]
        )
    settings = read_settings(out)
    if status == 0:
        found = f"{settings.get('ClusterName', '?')} answers, Slurm {settings.get('SLURM_VERSION', '?')}"
        checks.append(Check("Slurm controller", "OK", found))
        checks += [munge] if (munge := _munge(settings)) else []
    partition = _partition(environment.get("SLURM_JOB_PARTITION") or (job.partition if job else None))
    if partition is not None and not partition and job and job.partition:
        fix = "set job.partition to one that sinfo lists"
        checks.append(Check("partition", "MISS", f"job.partition = {job.partition!r} does not exist", fix))
    if job and partition:
        checks.append(_time_of(job, partition))
    checks.append(when_time_is_up(settings, "scontrol" in there, inside))
    if status == 0:
        checks += [when_preempted(settings, partition or {}), when_a_node_is_lost(settings)]
    return checks


def _commands(there: list[str], inside: bool) -> Check:
    lost = [name for name in COMMANDS if name not in there]
    found = f"{', '.join(lost)} not in PATH" if lost else "all in PATH"
    fix = "load the site's slurm module, or ask the site to install slurm-client here"
    return verdict(not lost, "Slurm commands", found, fix, "WARN" if inside else "MISS")


def _controller(status: int, errors: str, munge: Check | None) -> Check:
    found = "no answer within 10 s" if status == NO_ANSWER else last_line(errors) or f"scontrol ends with {status}"
    bad = munge is not None and munge.level != "OK"
    fix = "mend munge first" if bad else "ask the site whether slurmctld is up (scontrol ping)"
    return Check("Slurm controller", "MISS", found, fix)


def _munge(settings: Mapping[str, str]) -> Check | None:
    """None where the site does without munge, or it is not for users to call."""
    if shutil.which("munge") is None or settings.get("AuthType", "auth/munge") != "auth/munge":
        return None
    named = re.search(r"socket=([^,\s]+)", settings.get("AuthInfo", ""))
    sockets = [f"--socket={named[1]}"] if named else []
    status, _, errors = run_command("munge", "--no-input", *sockets)
    if status == 0:
        return Check("munge", "OK", "gives credentials")
    # Slurm's own answer, where there is one, says that munge works, whatever its command says.
    return Check("munge", "WARN" if settings else "MISS", last_line(errors.partition("\n")[0]) or f"ends with {status}",
                 "the site must start munged on this machine")  # fmt: skip


def read_settings(text: str) -> dict[str, str]:
    """Names and values of `scontrol show config`."""
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*= (.*)$", text, re.MULTILINE)}


def seconds_of(value: str) -> int:
    """Seconds of "30 sec", or 0 where the value is no number."""
    match = re.match(r"\d+", value)
    return int(match[0]) if match else 0


def _partition(name: str | None) -> dict[str, str] | None:
    """Settings of a partition, by default the site's default one; empty where it does not exist, None if nobody answers."""
    status, out, errors = run_command("scontrol", "--oneliner", "show", "partition", *([name] if name else []))
    if status:
        return {} if "not found" in errors + out else None
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in out.splitlines()]
    return next((one for one in found if name or one.get("Default") == "YES"), {})


def _time_of(job: JobConfig, partition: Mapping[str, str]) -> Check:
    """Whether the partition's limits let the job in."""
    name, longest = partition.get("PartitionName", "?"), partition.get("MaxTime", "UNLIMITED")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", longest)
    minutes = None
    if match:
        days, hours, rest, _ = (int(part or 0) for part in match.groups())
        minutes = (days * 24 + hours) * 60 + rest
    nodes = partition.get("MaxNodes", "UNLIMITED")
    if minutes is not None and job.time_min > minutes:
        found = f"{name} allows {minutes} minutes, job.time_min = {job.time_min}"
        return Check(
            "partition", "MISS", found, f"set job.time_min = {minutes}: the run goes on by itself, life after life"
        )
    if nodes.isdigit() and job.nodes > int(nodes):
        return Check(
            "partition", "MISS", f"{name} allows {nodes} nodes, job.nodes = {job.nodes}", f"set job.nodes = {nodes}"
        )
    return Check("partition", "OK", f"{name}, at most {'any time' if minutes is None else f'{minutes} minutes'} a job")


def requeue_codes(value: str) -> set[int]:
    """Exit codes of RequeueExit, "1-9,18"."""
    codes = set[int]()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", value):
        codes |= set(range(int(first), int(last or first) + 1))
    return codes


def when_time_is_up(settings: Mapping[str, str], scontrol: bool, inside: bool) -> Check:
    """How a run that has saved comes back."""
    by_code = Stopped.exit_code in requeue_codes(settings.get("RequeueExit", ""))
    if by_code:
        return Check(
            "time limit", "OK", f"the run saves and ends with {Stopped.exit_code}, which this site queues again"
        )
    if scontrol:
        doubt = "" if inside else "; srun -n1 spire-dist doctor tells whether compute nodes have it"
        return Check("time limit", "OK", f"the run saves, and its job queues itself again with scontrol requeue{doubt}")
    found = "the run saves and ends for good: no scontrol on this node, and RequeueExit lacks 75"
    return Check(
        "time limit",
        "WARN",
        found,
        "submit again by hand, the same command goes on; or ask the site for RequeueExit=75",
    )


def when_preempted(settings: Mapping[str, str], partition: Mapping[str, str]) -> Check:
    """What a job with priority does to a run."""
    mode = partition.get("PreemptMode") or settings.get("PreemptMode", "OFF")
    kind = settings.get("PreemptType", "preempt/none")
    if kind in ("preempt/none", "(null)") or mode == "OFF":
        return Check("preemption", "OK", "jobs here are never preempted")
    grace = seconds_of(partition.get("GraceTime", settings.get("GraceTime", "0")))
    kill = seconds_of(settings.get("KillWait", "30"))
    until = f"TERM, then {grace + kill} s to save (GraceTime {grace} + KillWait {kill})"
    if "CANCEL" in mode:
        fix = "submit again by hand, the same command goes on; or ask the site for PreemptMode=REQUEUE"
        return Check("preemption", "WARN", f"{until}, and the job is cancelled for good", fix)
    if "SUSPEND" in mode:
        found = "the job stands still, and other ranks may take it for dead (parallel.timeout_s)"
        return Check("preemption", "WARN", found, "ask the site for PreemptMode=REQUEUE")
    fix = "lower output.save_seconds: what was done since the last save may be lost"
    return verdict(grace + kill >= SHORT_GRACE_S, "preemption", f"{until}, and the job is queued again", fix)


def when_a_node_is_lost(settings: Mapping[str, str]) -> Check:
    """How long Slurm takes to notice."""
    seconds = seconds_of(settings.get("SlurmdTimeout", "300"))
    if seconds == 0:
        return Check("node loss", "WARN", "never noticed (SlurmdTimeout 0)", "ask the site for SlurmdTimeout=300")
    found = f"noticed within about {seconds} s (SlurmdTimeout), then the job is queued again (--requeue)"
    return Check("node loss", "OK", found)
