"""The picture of a comparison: AUC of every method, and AUC against training time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from spire_dist.results.plots import GREY, INK, figure, legend

Row = dict[str, Any]


def draw(path: Path, rows: Sequence[Row], scores: Sequence[dict], ceiling: float) -> None:
    """PNG. Left: mean over conformations of each seed (dots) and their std (bars). Right: a line for each run."""
    where = "masked" if any(row["masked"] for row in rows) else "unmasked"
    canvas, (left, right) = figure(11, 1.6 + 0.3 * max(len(rows), 8), columns=2)
    colours = {row["name"]: f"C{number % 10}" for number, row in enumerate(rows)}
    for place, row in enumerate(rows):
        values, deviation = row[where], row[f"{where} std"]
        left.errorbar(np.mean(values), place, xerr=np.mean(deviation), color=colours[row["name"]], capsize=3)
        left.plot(values, [place] * len(values), "o", color=colours[row["name"]], markersize=5, alpha=0.8)
    left.axvline(ceiling, color=GREY, linestyle="--", linewidth=1)
    left.set_yticks(range(len(rows)), [row["label"].removeprefix("- ") for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"AUC, {where}", title="mean of each seed, and std over conformations; dashed: largest possible")
    labelled = {row["name"]: row["label"].removeprefix("- ") for row in rows}
    for score in scores:
        points = [*score["earlier"], score]
        seconds = [point["training_s"] for point in points]
        values = [point["result"]["scores"][f"per_conformation/model_{where}"]["mean"] for point in points]
        label = labelled.pop(score["method"], None)
        right.plot(seconds, values, "o-", color=colours[score["method"]], label=label, markersize=4, linewidth=1.2)
    for row in rows:
        if row["name"] in ("average", "consensus"):
            right.axhline(np.mean(row[where]), color=colours[row["name"]], linestyle=":", label=labelled[row["name"]])
    right.axhline(ceiling, color=GREY, linestyle="--", linewidth=1)
    right.set(xscale="log", xlabel="training, s", ylabel=f"AUC, {where}", title="against training time")
    for axis, subs in ((right.xaxis.set_major_locator, (1.0,)), (right.xaxis.set_minor_locator, (2.0, 5.0))):
        axis(LogLocator(subs=subs))
    right.xaxis.set_major_formatter("{x:.0f}")
    right.xaxis.set_minor_formatter("{x:.0f}")
    right.tick_params(axis="x", which="minor", labelsize=right.xaxis.get_ticklabels()[0].get_fontsize())
    legend(right)
    for axes in (left, right):
        axes.set_title(axes.get_title(), fontsize=9.5, color=INK)
    canvas.savefig(path, dpi=150, facecolor="white", format="png")
