"""How a run is doing: one typed state, made of nothing but the files of its directory and, where there is Slurm, the queue."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.alarms import Alarm, beat_age, find_alarms, stuck_ranks
from cluster.run_files import (
    DEPTH,
    Record,
    RunFiles,
    find_runs,
    moment,
    number,
    rank_logs,
    read_files,
    thinned,
    whole,
)
from cluster.run_life import State, life_state, newest_job, slurm_job
from cluster.squeue import look
from spire_dist.config import RunConfig
from spire_dist.errors import RunError

__all__ = [
    "Alarm",
    "RankState",
    "RunState",
    "State",
    "distinct_names",
    "find_runs",
    "read_curves",
    "read_state",
    "read_states",
]

SPEED_LINES = 10
"""Log lines whose median speed is that of the time left: one line alone jumps."""

MOST_POINTS = 2000
MOST_RANKS = 10_000


@dataclass(frozen=True)
class RankState:
    """One rank. What its files do not say is None; a run that has ended well has no signs of life."""

    rank: int
    host: str | None
    pid: int | None
    step: int | None
    waiting: bool | None
    """In a collective, or for the first rank: waiting for others."""
    beat_age_s: float | None
    images_per_s: float | None
    wait_share: float | None
    """Of the time, for data."""
    collective_share: float | None
    """Of the time, for other ranks."""
    memory_gib: float | None


@dataclass(frozen=True)
class RunState:
    """A run as its files tell it. What they do not say is None."""

    path: Path
    name: str
    """End of the path, as long as it must be to differ from those of the runs read with it."""
    state: State
    stage: int | None
    step: int | None
    total: int | None
    """Steps of this stage."""
    epoch: float | None
    loss: float | None
    images_per_s: float | None
    eta_s: float | None
    """Seconds to the end of the run; None unless it trains."""
    eta_rough: bool
    """In stage 1 `eta_s` holds a guess of stage 2: its images at this speed, each slower as it has more Gaussians."""
    elapsed_s: float | None
    """Seconds of training, all lives together."""
    restarts: int
    ranks: tuple[RankState, ...]
    slowest_rank: int | None
    beat_age_s: float | None
    """Seconds since the newest sign of life of any rank."""
    job: str | None
    queue: str | None
    """What Slurm's queue says of the job, "PENDING (Priority)"; "gone" where it has left; None where nobody was asked."""
    message: str
    alarms: tuple[Alarm, ...]


def read_state(run: Path, now: float | None = None, queue: Mapping[str, str] | None = None) -> RunState:
    """The state of a run directory at `now` (epoch seconds; default: this moment).

    `queue` says how jobs are, by id (`squeue.look`); None: nobody was asked.
    """
    return _state_of(read_files(run), run.resolve().name, time.time() if now is None else now, queue)


def read_states(paths: Sequence[Path]) -> list[RunState]:
    """The states of all runs of `find_runs(paths)`; the queue is asked once for all of them.

    Raises RunError where there is no run, or a path is no folder.
    """
    runs = find_runs(paths)
    if not runs:
        where = ", ".join(map(str, paths))
        raise RunError(
            f"{where}: no run directory here, nor {DEPTH} folders deep; give the --run of a spire-dist train"
        )
    found = [read_files(run) for run in runs]
    queue = look(job for files in found if (job := slurm_job(files)) is not None)
    now = time.time()
    return [_state_of(files, name, now, queue) for files, name in zip(found, distinct_names(runs), strict=True)]


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The ends of paths, each as long as it must be to differ from all others."""
    parts = [run.resolve().parts for run in runs]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names.append(str(Path(*own[-length:])))
    return names


def read_curves(run: Path) -> tuple[list[Record], dict[int, list[Record]]]:
    """(records of metrics.jsonl, those of each rank), thinned to at most `MOST_POINTS` each.

    One rank alone writes no records of its own.
    """
    ranks = {rank: thinned(path, MOST_POINTS) for rank, path in rank_logs(run)}
    return thinned(run / "metrics.jsonl", MOST_POINTS), ranks


def _state_of(files: RunFiles, name: str, now: float, queue: Mapping[str, str] | None) -> RunState:
    job, newest = newest_job(files), files.newest
    told = queue.get(job) if queue is not None and job is not None else None
    stuck = stuck_ranks(files, now)
    state = life_state(files, bool(stuck), told, now)
    stuck = stuck if state == "STUCK" else []
    reached = max(filter(None, map(_place, [files.status, newest, *files.beats.values()])), default=(None, None))
    logged = newest if whole(newest, "stage") == reached[0] else {}
    eta_s, rough = _left(files, now) if state == "training" else (None, False)
    return RunState(
        path=files.path,
        name=name,
        state=state,
        stage=reached[0],
        step=reached[1],
        total=_total(logged, files.config),
        epoch=number(logged, "epoch"),
        loss=number(logged, "loss"),
        images_per_s=number(logged, "images_per_s"),
        eta_s=eta_s,
        eta_rough=rough,
        elapsed_s=number(newest, "elapsed_s"),
        restarts=_restarts(files),
        ranks=_ranks(files, now),
        slowest_rank=whole(logged, "slowest_rank"),
        beat_age_s=beat_age(files, now),
        job=job,
        queue=told,
        message=_message(files),
        alarms=find_alarms(files, state, stuck, told, now),
    )


def _place(record: Record) -> tuple[int, int] | None:
    stage, step = whole(record, "stage"), whole(record, "step")
    return None if stage is None or step is None else (stage, step)


def _total(logged: Record, config: RunConfig | None) -> int | None:
    """Steps of the stage that a log line is of; older versions leave them to be found from its epoch."""
    step, epoch = number(logged, "step"), number(logged, "epoch")
    if "total" in logged or config is None or not step or not epoch:
        return whole(logged, "total")
    return round((config.stage1 if logged["stage"] == 1 else config.stage2).epochs * step / epoch)


def _left(files: RunFiles, now: float) -> tuple[float | None, bool]:
    """(seconds to the end of the run, whether stage 2 is guessed in them)."""
    newest, config, total = files.newest, files.config, _total(files.newest, files.config)
    step, written, stage = number(newest, "step"), moment(newest), newest.get("stage")
    lines = [line for line in files.records[-SPEED_LINES:] if line.get("stage") == stage]
    speed = statistics.median([number(line, "images_per_s") or 0.0 for line in lines] or [0.0])
    if config is None or total is None or step is None or not speed:
        return None, False
    left = (total - step) * (config.stage1 if stage == 1 else config.stage2).batch / speed
    left = max(0.0, left - (max(0.0, now - written) if written is not None else 0.0))
    if stage != 1:
        return left, False
    images = total * config.stage1.batch / config.stage1.epochs * config.stage2.epochs
    return left + images / speed * config.stage2.gaussians / config.stage1.gaussians, True


def _restarts(files: RunFiles) -> int:
    lives = sum(record.get("event") == "started" for record in files.lives)
    return max([lives - 1, 0, *(whole(beat, "restart") or 0 for beat in files.beats.values())])


def _ranks(files: RunFiles, now: float) -> tuple[RankState, ...]:
    """All ranks of the newest life, those without any sign included."""
    return (
        tuple(_rank(files, rank, now) for rank in range(min(files.world, MOST_RANKS)))
        if files.records or files.beats
        else ()
    )


def _rank(files: RunFiles, rank: int, now: float) -> RankState:
    beat = files.beats.get(rank, {})
    logged = files.newest if files.world == 1 else files.ranks.get(rank, {})
    host, waiting, time = beat.get("host"), beat.get("waiting"), number(beat, "time")
    place = max(filter(None, (_place(beat), _place(logged))), default=None)
    return RankState(
        rank=rank,
        host=host if isinstance(host, str) else None,
        pid=whole(beat, "pid"),
        step=place[1] if place else None,
        waiting=waiting if isinstance(waiting, bool) else None,
        beat_age_s=None if time is None else max(0.0, now - time),
        images_per_s=number(logged, "images_per_s"),
        wait_share=number(logged, "wait_share"),
        collective_share=number(logged, "collective_share"),
        memory_gib=number(logged, "memory_gib"),
    )


def _message(files: RunFiles) -> str:
    """What the run said when it ended; how its job's last life ended, where it could not say it."""
    said = files.status.get("message")
    if said or not files.lives or files.lives[-1].get("event") != "ended":
        return str(said or "")
    last = files.lives[-1]
    return "; ".join(str(last[key]) for key in ("why", "then") if last.get(key))
