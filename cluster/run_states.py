"""How a run is doing: one typed state, made of nothing but the files of its directory and, where there is Slurm, the queue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.alarms import Alarm
from cluster.run_files import Record, find_runs, rank_log, thinned

__all__ = ["Alarm", "RankState", "RunState", "find_runs", "read_curves", "read_state", "read_states"]

State = Literal[
    "queued", "starting", "training", "suspended", "stopped", "failed", "complete", "STUCK", "no sign of life"
]

MOST_POINTS = 2000


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
    raise NotImplementedError


def read_states(paths: Sequence[Path]) -> list[RunState]:
    """The states of all runs of `find_runs(paths)`, the queue asked once for all of them. Raises RunError where there is none."""
    raise NotImplementedError


def read_curves(run: Path) -> tuple[list[Record], dict[int, list[Record]]]:
    """(records of metrics.jsonl, those of each rank), thinned to at most `MOST_POINTS` each; no ranks where there is but one."""
    ranks = {}
    for path in sorted((run / "ranks").glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        ranks[rank] = thinned(rank_log(run, rank), MOST_POINTS)
    return thinned(run / "metrics.jsonl", MOST_POINTS), ranks
