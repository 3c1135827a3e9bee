"""What is wrong with a run, in plain words: told by `status`, by the monitor page and to Prometheus.

A rank is called stuck when its sign of life (`distributed/heartbeat.py`, every 5 s) has stood still for `STALE_S` while others'
come, or when all others wait for it at a step that does not grow. Both are told within 30 s.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from cluster.run_files import RunFiles, moment, number, whole

Kind = Literal["stuck", "dead", "straggler", "loss", "requeues", "failed", "clock"]

STALE_S = 15.0
"""Age of a sign of life that says that its process stands still: three were due meanwhile."""

SLOW_STEPS = 3.0
"""A step may take so many times as long as usual (and `STALE_S`) before a rank that all wait for is called stuck."""

ALL_STILL_S = 120.0
"""So long all ranks together may take for what is not a step: to save."""

CLOCK_S = 5.0
"""A sign of life from so far in the future is told."""

SLOW_LINES = 3
"""Log lines in a row that must name the same slowest rank."""

LOSS_LINES = 40
LOSS_RISE = 1.03
"""The loss is mostly noise of the images, the same all the time: a rise by so much is none of chance."""

REQUEUES_USED = 0.9


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong."""

    kind: Kind
    """stuck: a rank gives no sign or does not move; dead: no rank gives a sign; straggler: a rank is slower than the others;
    loss: not finite, or rising; requeues: few are left; failed: ended by an error; clock: a machine's time differs."""
    text: str
    """One line that names the rank, its host and how long, where it is about one."""
    rank: int | None = None


def duration(seconds: float) -> str:
    """Two units at most: "25 s", "3 min", "2 h 10 min", "3 d 4 h"."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def beat_age(files: RunFiles, now: float) -> float | None:
    """Seconds since the newest sign of life of any rank; None where there is none."""
    return max(0.0, now - max(beat["time"] for beat in files.beats.values())) if files.beats else None


def stuck_ranks(files: RunFiles, now: float) -> list[Alarm]:
    """The ranks that the others wait for in vain; none where no rank at all gives a sign."""
    age = beat_age(files, now)
    if age is None or age > STALE_S:
        return []
    silent = [_silent(files, rank, now) for rank in range(files.world)] if files.world > 1 else []
    return [alarm for alarm in silent if alarm is not None] or _holding_up(files, now)


def _silent(files: RunFiles, rank: int, now: float) -> Alarm | None:
    """A rank whose sign stands still, or never came, while others' do come."""
    beat, together = files.beats.get(rank), _last_together(files)
    if beat is None:
        since = together or now  # 0: the ranks are just starting
    elif together > beat["time"] + STALE_S:  # the run has gone on since: another life of it, or a clock that is behind
        since = max(together, beat["seen"])
    else:
        since = beat["time"]
    if now - since <= STALE_S:
        return None
    if beat is None:
        return Alarm("stuck", f"rank {rank} has given no sign of life; the others wait for it", rank)
    long = duration(now - beat["time"])
    return Alarm("stuck", f"{_named(files, rank)} has given no sign of life for {long}; the others wait for it", rank)


def _holding_up(files: RunFiles, now: float) -> list[Alarm]:
    """Ranks that live but do not come to where all others wait, or all of them where nobody knows who waits for whom."""
    newest, step = files.newest, max(whole(beat, "step") or 0 for beat in files.beats.values())
    total, time, seconds = whole(newest, "total"), moment(newest), _step_s(files)
    if files.config is None or total is None or time is None or seconds is None:
        return []
    logged = whole(newest, "step") or 0
    if any(whole(beat, "stage") != newest.get("stage") for beat in files.beats.values()) or logged >= total:
        return []  # between the stages the first rank works alone
    slack = SLOW_STEPS * seconds
    still = now - (time + max(0, step - logged) * seconds)
    if now - time <= files.config.output.log_seconds + slack or still <= STALE_S + slack:
        return []  # the next log line is not due; until then a step may have become slower than is known
    busy = [rank for rank, beat in files.beats.items() if not beat.get("waiting")]
    if 0 < len(busy) < files.world:
        text = f"has been at step {step} for {duration(still)}; the others wait for it"
        return [Alarm("stuck", f"{_named(files, rank)} {text}", rank) for rank in busy]
    if still <= ALL_STILL_S + slack:
        return []
    return [Alarm("stuck", f"step {step} has not ended for {duration(still)}, though all ranks give signs of life")]


def _last_together(files: RunFiles) -> float:
    """When all ranks lived for certain: they log and save together. Of the far past where they have not yet."""
    times = [moment(files.newest)]
    if files.status.get("state") == "training":
        times.append(moment(files.status))
    return max((time for time in times if time is not None), default=0.0)


def _step_s(files: RunFiles) -> float | None:
    """Seconds of a usual step."""
    speed, config = number(files.newest, "images_per_s"), files.config
    if config is None or not speed:
        return None
    return (config.stage1 if files.newest.get("stage") == 1 else config.stage2).batch / speed


def _named(files: RunFiles, rank: int) -> str:
    host = files.beats.get(rank, {}).get("host")
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def find_alarms(files: RunFiles, state: str, stuck: list[Alarm], queue: str | None, now: float) -> tuple[Alarm, ...]:
    """All that is wrong with a run in `state`, the worst first."""
    found = list(stuck)
    if state == "no sign of life":
        found.append(_dead(files, queue, now))
    if state == "failed":
        found.append(Alarm("failed", str(files.status.get("message") or "ended by an error; see its log")))
    if state in ("training", "STUCK"):
        found += [*_stragglers(files), *_clocks(files, now)]
    if state != "complete":
        found += [*_bad_loss(files), *_few_requeues(files)]
    return tuple(found)


def _dead(files: RunFiles, queue: str | None, now: float) -> Alarm:
    age = beat_age(files, now)
    if not files.status and age is None:
        return Alarm("dead", "its job left the queue before training began; see the log in jobs/")
    if age is None:
        age = now - max(_last_together(files), moment(files.status) or 0.0)
    stage, step = whole(files.status, "stage"), whole(files.status, "step")
    saved = f"last save: step {step} of stage {stage}" if step else "nothing saved yet"
    remedy = "run the same command again"
    if queue is not None and queue.startswith("RUNNING"):
        remedy = "Slurm says its job runs: see its log, then scontrol requeue or scancel it"
    return Alarm("dead", f"no sign of life for {duration(age)}: all ranks; {saved}; {remedy}")


def _stragglers(files: RunFiles) -> list[Alarm]:
    lines = files.records[-SLOW_LINES:]
    ranks = {whole(line, "slowest_rank") for line in lines}
    rank = ranks.pop() if len(ranks) == 1 and len(lines) == SLOW_LINES else None
    if rank is None:
        return []
    times = statistics.median(number(line, "slowest_times") or 0.0 for line in lines)
    return [
        Alarm("straggler", f"{_named(files, rank)} is slow: {times:.1f} times the work of the others per step", rank)
    ]


def _clocks(files: RunFiles, now: float) -> list[Alarm]:
    """Machines whose time differs from that of this one, or of the file system."""
    off: dict[str, float] = {}
    for rank, beat in sorted(files.beats.items()):
        ahead, behind = beat["time"] - now, beat["seen"] - beat["time"]
        late = behind > STALE_S and _last_together(files) > beat["time"] + STALE_S and now - beat["seen"] <= STALE_S
        if ahead > CLOCK_S or late:
            off.setdefault(str(beat.get("host") or f"rank {rank}'s machine"), ahead if ahead > CLOCK_S else -behind)
    return [
        Alarm(
            "clock",
            f"the clock of {host} is {duration(abs(by))} {'ahead' if by > 0 else 'behind'}; set it (chrony, ntpd)",
        )
        for host, by in off.items()
    ]


def _bad_loss(files: RunFiles) -> list[Alarm]:
    lines = [line for line in files.records if line.get("stage") == files.newest.get("stage") and "loss" in line]
    raw = files.newest.get("loss")
    if isinstance(raw, float) and not math.isfinite(raw):
        return [Alarm("loss", f"the loss is {raw} at step {whole(files.newest, 'step')}")]
    losses = [loss for line in lines if (loss := number(line, "loss")) is not None]
    if len(losses) < LOSS_LINES:
        return []
    before, after = (statistics.median(part) for part in (losses[: len(losses) // 2], losses[len(losses) // 2 :]))
    if before <= 0 or after < LOSS_RISE * before:
        return []
    return [
        Alarm("loss", f"the loss rises: {before:.5g}, then {after:.5g} (medians of the last {len(losses)} log lines)")
    ]


def _few_requeues(files: RunFiles) -> list[Alarm]:
    used = sum(
        record.get("then") == "requeued" for record in files.lives if record.get("job") == files.lives[-1].get("job")
    )
    limit = files.config.job.requeues if files.config else 0
    if not used or not limit or used < REQUEUES_USED * limit:
        return []
    return [Alarm("requeues", f"queued again {used} of {limit} times; raise job.requeues if it needs more")]
