"""What a sweep found: a table, a picture of all trials, and the best configuration, ready to train. Called by `sweep.py`."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cluster.sweep_files import Report, read_reports, trial_folder
from cluster.sweep_space import Settings, Space, Varied
from spire_dist.config import dump_config
from spire_dist.errors import RunError
from spire_dist.files import replacing, write_durably

BEST = "#d62728"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    number: int
    state: str
    """done, stopped (early), failed or not begun."""
    share: float
    """Of the training, reached."""
    value: float | None
    """Of the metric, in the last report."""
    steps: int
    train_s: float
    look_s: float
    settings: Settings
    parent: int | None
    """Of a population: whose state it last went on from."""


def outcomes(out: Path, space: Space) -> list[Outcome]:
    """All trials, the best first: those that came furthest, by their last report."""
    found = [
        _outcome(number, drawn, read_reports(trial_folder(out, number)), space)
        for number, drawn in enumerate(space.draws())
    ]
    sign = 1 if space.sweep.mode == "min" else -1
    return sorted(found, key=lambda o: (o.value is None, -o.share, sign * (o.value or 0.0), o.number))


def _outcome(number: int, drawn: Settings, reports: list[Report], space: Space) -> Outcome:
    good = [report for report in reports if space.sweep.metric in report]
    last = good[-1] if good else {"share": 0.0, "steps": 0}
    if any("failed" in report for report in reports):
        state = "failed"
    else:
        state = "done" if last["share"] == 1 else "stopped" if good else "not begun"
    return Outcome(
        number,
        state,
        last["share"],
        last.get(space.sweep.metric),
        last["steps"],
        sum(report["train_s"] for report in good),
        sum(report["look_s"] for report in good),
        last.get("settings", drawn),
        next((report["parent"] for report in reversed(good) if "parent" in report), None),
    )


def write_results(out: Path, space: Space) -> str:
    """Write results.csv, sweep.png and best.toml; returns the table and what comes next."""
    trials = outcomes(out, space)
    best = trials[0]
    if best.value is None:
        raise RunError(f"{out}: no trial came to a report; {trial_folder(out, best.number)}/train.log says why")
    write_durably(out / "results.csv", _as_csv(trials, space))
    where = f"{space.sweep.metric} {best.value:.6f} at {100 * best.share:.0f} % of the training"
    note = f"Trial {best.number} of {len(trials)} ({out.name}): {where}"
    if best.parent is not None:
        note += (
            "; its settings changed while it trained, these are the last: to keep that model, take its run directory"
        )
    write_durably(out / "best.toml", f"# {note}\n{dump_config(space.config(best.settings))}")
    with replacing(out / "sweep.png") as path:
        plot(path, trials, space)
    trained, looked = (sum(getattr(o, name) for o in trials) for name in ("train_s", "look_s"))
    return "\n".join(
        [
            *table(trials, space),
            f"{sum(o.share for o in trials):.1f} trainings' worth of steps, {trained:.0f} s of training and {looked:.0f} s "
            f"({100 * looked / max(trained + looked, 1e-9):.0f} %) of looking how good they are",
            f"best: trial {best.number}, {where}; {out / 'results.csv'}, {out / 'sweep.png'}",
            f"train it on all particles: spire-dist train {out / 'best.toml'} --run RUN",
        ]
    )


def table(trials: list[Outcome], space: Space) -> list[str]:
    """The trials as aligned lines."""
    names = [one.field for one in space.varied]
    pbt = space.sweep.search == "pbt"
    header = ["trial", space.sweep.metric, "trained", "", *(["from"] if pbt else []), *_short(names)]
    rows = [
        [
            str(o.number),
            "-" if o.value is None else f"{o.value:.6f}",
            f"{100 * o.share:.0f} %",
            o.state,
            *([] if not pbt else ["" if o.parent is None else str(o.parent)]),
            *(_shown(o.settings[name]) for name in names),
        ]
        for o in trials
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]


def _short(names: list[str]) -> list[str]:
    """Names of fields as they are shown."""
    return [name.replace(".rates.", ".") for name in names]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_csv(trials: list[Outcome], space: Space) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [one.field for one in space.varied]
    metric = space.sweep.metric
    writer.writerow(["trial", "state", "share", metric, "steps", "train_s", "look_s", "parent", *names])
    for o in trials:
        numbers = [round(o.share, 4), o.value, o.steps, round(o.train_s, 2), round(o.look_s, 2), o.parent]
        writer.writerow([o.number, o.state, *numbers, *(o.settings[name] for name in names)])
    return text.getvalue()


def plot(path: Path, trials: list[Outcome], space: Space) -> None:
    """Parallel coordinates: an axis for each field and one for the metric, its good end up, and a line for each trial."""
    shown = [o for o in trials if o.value is not None]
    done = [o for o in shown if o.share == shown[0].share]
    values = [o.value for o in done if o.value is not None]
    best, worst = values[0], min(values) if space.sweep.mode == "max" else max(values)
    span = best - worst or 1.0
    axes = [*space.varied]
    figure, plane = plt.subplots(figsize=(max(6.0, 1.7 * (len(axes) + 1)), 4.8), layout="constrained")
    colours = plt.get_cmap("viridis_r")
    for o in reversed(shown):
        assert o.value is not None
        places = [_place(one, o.settings[one.field]) for one in axes]
        if o in done:
            places.append((o.value - worst) / span)
            first = o is done[0]
            colour = BEST if first else colours(0.15 + 0.8 * (o.value - worst) / span)
            plane.plot(places, color=colour, linewidth=3 if first else 1.6, zorder=3 if first else 2)
        else:
            plane.plot(places, color="0.75", linewidth=0.9, zorder=1)
    for x, one in enumerate(axes):
        _draw_axis(plane, x, _ticks(one))
    _draw_axis(plane, len(axes), [(share, f"{worst + share * span:.5f}") for share in (0.0, 0.5, 1.0)])
    labels = [*_short([one.field for one in axes]), space.sweep.metric]
    plane.set_xticks(range(len(labels)), labels, fontsize=9)
    plane.set_yticks([])
    plane.set_xlim(-0.25, len(axes) + 0.55)
    plane.set_ylim(-0.04, 1.04)
    for side in plane.spines.values():
        side.set_visible(False)
    plane.tick_params(axis="x", length=0)
    early = len(shown) - len(done)
    title = f"{len(shown)} trials, good ones end high; red: the best"
    plane.set_title(title + (f"; grey: {early} stopped early" if early else ""), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_axis(plane: Any, x: int, ticks: list[tuple[float, str]]) -> None:
    plane.axvline(x, color="0.3", linewidth=1, zorder=4)
    for place, text in ticks:
        plane.plot([x, x + 0.03], [place, place], color="0.3", linewidth=1, zorder=4)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
        plane.text(x + 0.05, place, text, fontsize=8, va="center", bbox=box, zorder=5)


def _place(one: Varied, value: Any) -> float:
    """Where on its axis, 0 to 1, a value is."""
    if one.kind == "choice":
        return one.values.index(value) / max(len(one.values) - 1, 1)
    low, high = one.values
    if one.kind == "log":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _ticks(one: Varied) -> list[tuple[float, str]]:
    if one.kind == "choice":
        return [(_place(one, value), _shown(value)) for value in one.values]
    low, high = one.values
    middle = math.sqrt(low * high) if one.kind == "log" else (low + high) / 2
    return [(0.0, _shown(low)), (0.5, f"{middle:.3g}"), (1.0, _shown(high))]
