"""States of runs as Prometheus metrics: served by the monitor under /metrics, or a file for node_exporter.

All are gauges of what the run directories said last, with the run's name as label `run`. docs/grafana.json draws them.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias, get_args

from prometheus_client import CollectorRegistry, Gauge, generate_latest, write_to_textfile

from cluster.alarms import Kind
from cluster.run_states import RankState, RunState, State
from spire_dist.errors import RunError

Value: TypeAlias = float | None

OF_RUNS: dict[str, tuple[str, Callable[[RunState], Value]]] = {
    "spire_stage": ("Stage of training, 1 or 2", lambda run: run.stage),
    "spire_step": ("Steps done in this stage", lambda run: run.step),
    "spire_stage_steps": ("Steps of this stage in all", lambda run: run.total),
    "spire_epoch": ("Passes over the particles in this stage", lambda run: run.epoch),
    "spire_loss": ("Loss per pixel, mean of the last log interval", lambda run: run.loss),
    "spire_images_per_second": ("Speed of all ranks together while it trains", lambda run: _speed(run)),
    "spire_left_seconds": ("Time to the end of the run, in stage 1 with a guess of stage 2", lambda run: run.eta_s),
    "spire_trained_seconds": ("Time of training, all lives together", lambda run: run.elapsed_s),
    "spire_restarts": ("Lives of the job after its first one", lambda run: run.restarts),
    "spire_ranks": ("Ranks of the newest life", lambda run: len(run.ranks)),
    "spire_beat_age_seconds": ("Time since the newest sign of life of any rank", lambda run: run.beat_age_s),
}  # fmt: skip
"""Name -> (help, value); a value of None is left out. Ranks are told of while their run trains."""

OF_RANKS: dict[str, tuple[str, Callable[[RankState], Value]]] = {
    "spire_rank_step": ("Steps done in this stage", lambda rank: rank.step),
    "spire_rank_waiting": ("1 while it waits for other ranks", lambda rank: rank.waiting),
    "spire_rank_beat_age_seconds": ("Time since its sign of life", lambda rank: rank.beat_age_s),
    "spire_rank_images_per_second": ("Speed of this rank", lambda rank: rank.images_per_s),
    "spire_rank_data_wait_ratio": ("Share of its time spent waiting for data", lambda rank: rank.wait_share),
    "spire_rank_collective_ratio": ("Share of its time spent waiting for other ranks", lambda rank: rank.collective_share),
    "spire_rank_memory_bytes": ("Memory, of the GPU if it has one", lambda rank: _bytes(rank.memory_gib)),
}  # fmt: skip


def metrics_text(states: Sequence[RunState]) -> str:
    """All metrics in Prometheus' text format."""
    return generate_latest(_registry(states)).decode()


def write_metrics(path: Path, states: Sequence[RunState]) -> None:
    """Replace the file `path`, which node_exporter reads if it ends in .prom. Raises RunError where it cannot be written."""
    try:
        write_to_textfile(str(path), _registry(states))
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); name a file in a folder you may write to"
        ) from error


def _registry(states: Sequence[RunState]) -> CollectorRegistry:
    registry = CollectorRegistry()
    going = [run for run in states if run.state in ("training", "STUCK")]  # the others' ranks are at rest, or nowhere
    for name, (text, value) in OF_RUNS.items():
        _fill(registry, name, text, ("run",), (((run.name,), value(run)) for run in states))
    for name, (text, value) in OF_RANKS.items():
        of_ranks = (((run.name, str(rank.rank)), value(rank)) for run in going for rank in run.ranks)
        _fill(registry, name, text, ("run", "rank"), of_ranks)
    _fill(
        registry, "spire_rank_info", "Where a rank runs; always 1", ("run", "rank", "host"),
        (((run.name, str(rank.rank), rank.host), 1) for run in going for rank in run.ranks if rank.host is not None),
    )  # fmt: skip
    _fill(
        registry, "spire_state", "1 for the state that a run is in, 0 for the others", ("run", "state"),
        (((run.name, state), run.state == state) for run in states for state in get_args(State)),
    )  # fmt: skip
    _fill(
        registry, "spire_alarms", "Alarms of a run, by kind", ("run", "kind"),
        (((run.name, kind), sum(alarm.kind == kind for alarm in run.alarms)) for run in states for kind in get_args(Kind)),
    )  # fmt: skip
    _fill(
        registry, "spire_rank_stuck", "1 for a rank that the others wait for in vain", ("run", "rank"),
        (((run.name, str(rank.rank)), rank.rank in _stuck(run)) for run in going for rank in run.ranks),
    )  # fmt: skip
    return registry


def _fill(
    registry: CollectorRegistry,
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Iterable[tuple[tuple[str, ...], Value]],
) -> None:
    gauge = Gauge(name, text, labels, registry=registry)
    for of, value in values:
        if value is not None:
            gauge.labels(*of).set(value)


def _stuck(run: RunState) -> set[int | None]:
    return {alarm.rank for alarm in run.alarms if alarm.kind == "stuck"}


def _speed(run: RunState) -> float | None:
    return run.images_per_s if run.state == "training" else 0.0


def _bytes(gib: float | None) -> float | None:
    return None if gib is None else gib * 2**30
