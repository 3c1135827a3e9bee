"""What `spire-dist monitor` answers: its pages, made of the states and curves of runs, and the same as JSON.

However many look at it, files are read no more often than `FRESH_S`; curves of long runs less often than that.
"""

import dataclasses
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster import run_charts, status
from cluster.alarms import STALE_S, duration
from cluster.drawn import Pictures
from cluster.painter import Painter
from cluster.prometheus import metrics_text
from cluster.run_files import thinned
from cluster.run_states import RunState, find_runs, read_curves, read_states
from spire_dist import __version__
from spire_dist.errors import RunError

FRESH_S, FRESH_WITH_QUEUE_S = 2.0, 5.0
"""How old states may be that are shown: a page asks every 3 s. Slurm's controller is to be asked less often than files."""
PATIENCE = 30
"""Curves that took t to read are read again no sooner than so many times t later."""
SPARK_POINTS = 60
MOST_ALARMS_OF_MANY = 3
"""Lines for one run beside others; the rest is counted."""
MOST_ROWS = 24
"""Ranks in a table; of more, those that need to be looked at."""

GRAVE = ("stuck", "dead", "failed", "loss")
ASSETS = {
    "style.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HTML = "text/html; charset=utf-8"

Curves = tuple[list[Mapping[str, Any]], dict[int, list[Mapping[str, Any]]]]


@dataclass(frozen=True)
class Reply:
    """What goes back over HTTP."""

    status: int
    kind: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownAlarm:
    """A line on top of a page."""

    run: str
    kind: str
    text: str
    grave: bool


@dataclass(frozen=True)
class Cached:
    """Curves, when they were read, in how many seconds, and of what file."""

    curves: Any
    time: float
    cost_s: float
    file: tuple[int, int]


def problem(status: int, text: str) -> Reply:
    """A page that says why there is no other."""
    headers = {"WWW-Authenticate": 'Bearer realm="spire-dist monitor"'} if status == 401 else {}
    return Reply(status, HTML, _render("problem.html", status=status, text=text), headers)


def _page(name: str, **context: Any) -> Reply:
    return Reply(200, HTML, _render(name, **context))


def _render(name: str, **context: Any) -> bytes:
    return _templates().get_template(name).render(version=__version__, **context).encode()


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("cluster"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": _number, "percent": _percent}
    return environment


@cache
def _asset(name: str) -> bytes:
    return files("cluster").joinpath("templates", name).read_bytes()


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def _as_json(value: Any) -> Reply:
    return Reply(200, "application/json", json.dumps(_finite(value), indent=1, default=str).encode())


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Pages:
    """Answers requests about the runs below some paths; runs that begin later are found too."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises RunError for a path that is no folder."""
        find_runs(paths)
        self._paths = paths
        self._lock = threading.Lock()
        self._states: tuple[float, list[RunState]] | None = None
        self._cached: dict[tuple[Path, bool], Cached] = {}
        self._painter = Painter()

    def __enter__(self) -> "Pages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._painter.close()

    def states(self) -> list[RunState]:
        """All runs that are there, no older than `FRESH_S`, or `FRESH_WITH_QUEUE_S` where a queue is asked."""
        # While one request reads, the others do with what was there before.
        if not self._lock.acquire(blocking=self._states is None):
            assert self._states is not None
            return self._states[1]
        try:
            read, found = self._states or (-math.inf, [])
            fresh = FRESH_WITH_QUEUE_S if any(state.job for state in found) else FRESH_S
            if time.monotonic() - read > fresh:
                try:
                    found = read_states(self._paths)
                except RunError:  # none yet, or the folder is gone for now
                    found = []
                self._states = time.monotonic(), found
            return found
        finally:
            self._lock.release()

    def reply(self, path: str, query: Mapping[str, str]) -> Reply:
        """The answer to a request that may be answered."""
        if path == "/":
            return self._overview()
        if path.removeprefix("/") in ASSETS:
            name = path.removeprefix("/")
            return Reply(200, ASSETS[name], _asset(name))
        if path == "/api/runs":
            return Reply(200, "application/json", status.as_json(self.states()).encode())
        if path == "/metrics":
            return Reply(200, "text/plain; version=0.0.4; charset=utf-8", metrics_text(self.states()).encode())
        if path not in ("/run", "/api/run", "/picture"):
            return problem(404, "There is no such page.")
        state = next((state for state in self.states() if state.name == query.get("name")), None)
        if state is None:
            return problem(404, f"There is no run {query.get('name', 'without a name')} (any more).")
        if path == "/picture":
            return self._picture(state, query.get("what", ""))
        if path == "/api/run":
            records, ranks = self._curves(state)
            return _as_json({"state": dataclasses.asdict(state), "records": records, "ranks": ranks})
        return self._run(state, "time" if query.get("over") == "time" else "step")

    def _overview(self) -> Reply:
        states = self.states()
        sparks = {state.name: run_charts.loss_spark(self._spark(state)) for state in states}
        alarms = [shown for state in states for shown in _shown_alarms(state, MOST_ALARMS_OF_MANY)]
        return _page(
            "overview.html",
            states=states,
            sparks=sparks,
            alarms=sorted(alarms, key=lambda shown: not shown.grave),
            paths=[str(path.resolve()) for path in self._paths],
            read=time.strftime("%H:%M:%S"),
        )

    def _run(self, state: RunState, over: run_charts.Over) -> Reply:
        records, ranks = self._curves(state)
        pictures, why = self._painter.look(state.path)
        named = {rank for rank in (state.slowest_rank, *(a.rank for a in state.alarms)) if rank is not None}
        shown = [rank for rank in state.ranks if len(state.ranks) <= MOST_ROWS or rank.rank in named][:MOST_ROWS]
        return _page(
            "run.html",
            state=state,
            over=over,
            charts=run_charts.together(records, over),
            rank_charts=run_charts.by_rank(ranks, over, sorted(named)),
            named=named,
            lines=run_charts.coloured(sorted(named)),
            few=run_charts.FEW,
            stale_s=STALE_S,
            ranks=shown,
            alarms=_shown_alarms(state, MOST_ROWS),
            pictures=pictures,
            why=why,
            age=None if pictures is None else max(0.0, time.time() - pictures.saved),
            read=time.strftime("%H:%M:%S"),
        )

    def _picture(self, state: RunState, what: str) -> Reply:
        pictures, why = self._painter.look(state.path)
        if pictures is None:
            return problem(404, f"No pictures of {state.name}: {why}.")
        png = _png_of(pictures, what)
        if png is None:
            return problem(404, f"No such picture of {state.name}.")
        return Reply(
            200, "image/png", png, {"Cache-Control": "private, max-age=3600"}
        )  # its address names the checkpoint

    def _curves(self, state: RunState) -> Curves:
        return self._kept(state.path, ranks=True)

    def _spark(self, state: RunState) -> list[Mapping[str, Any]]:
        return self._kept(state.path, ranks=False)

    def _kept(self, run: Path, ranks: bool) -> Any:
        """Curves as they were read last, or now where the file has changed and reading is not too dear."""
        old = self._cached.get((run, ranks))
        try:
            about = (run / "metrics.jsonl").stat()
            file = about.st_size, about.st_mtime_ns
        except OSError:
            file = 0, 0
        begun = time.monotonic()
        if old is not None and (old.file == file or begun - old.time < PATIENCE * old.cost_s):
            return old.curves
        curves = read_curves(run) if ranks else thinned(run / "metrics.jsonl", SPARK_POINTS)
        ended = time.monotonic()
        self._cached[run, ranks] = Cached(curves, ended, ended - begun, file)
        return curves


def _shown_alarms(state: RunState, most: int) -> list[ShownAlarm]:
    """The lines of a run, the gravest first."""
    alarms = sorted(state.alarms, key=lambda alarm: alarm.kind not in GRAVE)
    shown = [ShownAlarm(state.name, alarm.kind, alarm.text, alarm.kind in GRAVE) for alarm in alarms]
    if len(shown) <= most:
        return shown
    return [*shown[: most - 1], replace(shown[most - 1], text=f"and {len(shown) - most + 1} more")]


def _png_of(pictures: Pictures, what: str) -> bytes | None:
    if what == "scatter":
        return pictures.scatter
    return next((row.png for row in pictures.maps if row.name == what), None)
