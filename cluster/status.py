"""`spire-dist status`: a table of runs and what is wrong with them, once or again and again, for people or for programs."""

import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cluster.alarms import duration
from cluster.run_states import RunState, read_states

__all__ = ["as_json", "read_states", "table", "watch"]

FILE_WIDTH = 200
"""Columns where the output is no terminal: nothing has to be left out."""

MOST_ALARMS = 8
"""Of one run; the others are counted."""

STYLES = {
    "training": "green", "complete": "bold green", "STUCK": "bold red", "failed": "bold red", "no sign of life": "bold red",
    "stopped": "yellow", "suspended": "yellow", "queued": "cyan", "starting": "cyan",
}  # fmt: skip

LEFT_OUT = ("elapsed", "loss", "epoch", "queue", "job", "slowest", "restarts", "last sign")
"""Columns that a narrow terminal does without, the first one first."""

RUNNING = ("training", "STUCK")


def table(states: Sequence[RunState]) -> str:
    """A row for each run, then a line for each alarm; as wide as the terminal, in colour if there is one."""
    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=None if terminal else FILE_WIDTH, highlight=False)
    console.print(_picture(console, states))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def as_json(states: Sequence[RunState]) -> str:
    """A list of the fields of `RunState`; what is not known is null."""
    return json.dumps([_plain(dataclasses.asdict(state)) for state in states], indent=1, allow_nan=False)


def watch(paths: Sequence[Path], seconds: float) -> None:
    """Show the table of `read_states(paths)` every so many seconds, in place on a terminal, until Ctrl-C."""
    console = Console(highlight=False)
    states: Sequence[RunState] = ()
    try:
        states = read_states(paths)
        if console.is_terminal:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(_screen(console, states), refresh=True)
                    time.sleep(seconds)
                    states = read_states(paths)
        while True:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), table(states), sep="\n", end="\n\n", flush=True)
            time.sleep(seconds)
            states = read_states(paths)
    except KeyboardInterrupt:
        if console.is_terminal and states:
            print(table(states))  # what was seen last stays, the screen does not


def _screen(console: Console, states: Sequence[RunState]) -> RenderableType:
    """What fits on a screen; where not all runs do, those that need to be looked at come first."""
    head = Text(f"{time.strftime('%H:%M:%S')}   {len(states)} run{'s' if len(states) > 1 else ''}   Ctrl-C ends", "dim")
    if len(states) + 4 > console.height:
        urgency = ("complete", "stopped", "queued", "starting", "training")
        states = sorted(
            states, key=lambda state: urgency.index(state.state) if state.state in urgency else 9, reverse=True
        )
    return Group(head, Text(), _picture(console, states))


def _picture(console: Console, states: Sequence[RunState]) -> RenderableType:
    """The widest table that fits, and the lines below it."""
    rows = [_cells(state, console.width) for state in states]
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in ("", *LEFT_OUT):
        shown = [other for other in shown if other != name]
        grid = _grid(states, rows, shown)
        if Measurement.get(console, console.options.update(width=10**4), grid).maximum <= console.width:
            break
    lines = [line for state in states for line in _lines(state, "queue" in shown)]
    if any(state.eta_rough for state in states):
        lines.append(Text("~ stage 2 is guessed from stage 1", "dim"))
    return Group(grid, *([Text()] if lines else []), *lines)


def _grid(states: Sequence[RunState], rows: Sequence[dict[str, str]], shown: Sequence[str]) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in shown:
        left = name in ("run", "state", "queue")
        grid.add_column(name, no_wrap=True, justify="left" if left else "right", overflow="ellipsis")
    for state, row in zip(states, rows, strict=True):
        grid.add_row(*(Text(row[name], STYLES[state.state] if name == "state" else "") for name in shown))
    return grid


def _cells(state: RunState, width: int) -> dict[str, str]:
    """What the table says of a run, by column; empty where there is nothing to say."""
    going = state.state in RUNNING
    speed, left, sign = state.images_per_s, state.eta_s, state.beat_age_s
    return {
        "run": shortened(state.name, max(16, width // 3)),
        "state": state.state,
        "stage": "" if state.stage is None else str(state.stage),
        "step": "" if state.step is None else f"{state.step}/{state.total}" if state.total else str(state.step),
        "epoch": "" if state.epoch is None else f"{state.epoch:.1f}",
        "loss": "" if state.loss is None else f"{state.loss:.5g}",
        "images/s": "" if speed is None or state.state != "training" else f"{speed:,.0f}",
        "left": "" if left is None else ("~" if state.eta_rough else "") + duration(left),
        "elapsed": "" if state.elapsed_s is None else duration(state.elapsed_s),
        "restarts": str(state.restarts) if state.restarts else "",
        "slowest": f"rank {state.slowest_rank}" if state.slowest_rank is not None and going else "",
        "last sign": "" if sign is None else duration(sign),
        "job": state.job or "",
        "queue": state.queue or "",
    }


def _lines(state: RunState, with_queue: bool) -> list[Text]:
    """Below the table: alarms, what an ended run said, why a queued one waits."""
    said = [Text.assemble((state.name, "bold"), ": ", (alarm.text, "red")) for alarm in state.alarms[:MOST_ALARMS]]
    if len(state.alarms) > MOST_ALARMS:
        said.append(Text.assemble((state.name, "bold"), f": and {len(state.alarms) - MOST_ALARMS} more alarms"))
    if state.state == "stopped" and state.message:
        said.append(Text.assemble((state.name, "bold"), f": {state.message}"))
    if state.state == "queued" and state.queue and not with_queue:
        said.append(Text.assemble((state.name, "bold"), f": job {state.job} {state.queue}"))
    return said


def shortened(text: str, most: int) -> str:
    """A path whose end is what tells it from others, without its beginning where it is too long."""
    return text if len(text) <= most else "…" + text[1 - most :]


def _plain(value: Any) -> Any:
    """JSON's types only."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
