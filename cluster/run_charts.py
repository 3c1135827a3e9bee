"""The charts of a run: what all ranks do together, and each rank for itself; up to `FEW` by their lines, more as a band."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup

from cluster.charts import Band, Line, Points, Scale, chart, sparkline, thinned

Over = Literal["step", "time"]
Record = Mapping[str, Any]

FEW = 8
"""Ranks that get a line each; there are as many colours."""
MOST_POINTS = 400
"""Of one line: more than there are pixels."""
MOST_POINTS_OF_A_RANK = 200

PANELS: dict[str, tuple[str, Scale]] = {
    "images_per_s": ("images/s", "number"),
    "wait_share": ("waiting for data", "share"),
    "collective_share": ("waiting for other ranks", "share"),
}


def together(records: Sequence[Record], over: Over) -> list[Markup]:
    """Loss, speed and waiting of all ranks together, from metrics.jsonl."""
    starts = _starts(records)
    breaks = (
        [(_x({"stage": 2, "step": 0, "elapsed_s": starts["elapsed_s"]}, over, starts), "stage 2")] if starts else []
    )
    x_scale: Scale = "hours" if over == "time" else "number"

    def line(key: str, name: str, kind: str = "own") -> Line:
        return Line(name, thinned(_points(records, key, over, starts), MOST_POINTS), kind)

    waiting = [line("wait_share", "for data", "data")]
    if any("ranks" in record for record in records):
        waiting.append(line("collective_share", "for other ranks", "ranks"))
    shared = {"x_scale": x_scale, "breaks": breaks}
    return [
        chart("loss", [line("loss", "loss")], from_zero=False, **shared),
        chart("images/s", [line("images_per_s", "images/s")], **shared),
        chart("share of the time spent waiting", waiting, y_scale="share", **shared),
    ]


def by_rank(ranks: Mapping[int, Sequence[Record]], over: Over, named: Sequence[int]) -> list[Markup]:
    """A chart of each of `PANELS` with all ranks; of many ranks their band, their median and those `named`."""
    if not any(ranks.values()):
        return []
    starts = _starts(next(records for records in ranks.values() if records))
    x_scale: Scale = "hours" if over == "time" else "number"
    charts = []
    for key, (title, scale) in PANELS.items():
        curves = {
            rank: thinned(_points(records, key, over, starts), MOST_POINTS_OF_A_RANK)
            for rank, records in sorted(ranks.items())
        }
        band = None
        if len(curves) > FEW:
            band, median = _band(list(ranks.values()), key, over, starts)
            lines = [Line("median", median, "usual")]
            lines += [Line(f"rank {r}", curves[r], f"rank-{c}") for c, r in coloured(named) if r in curves]
        else:
            lines = [Line(f"rank {r}", points, f"rank-{r % FEW}") for r, points in curves.items()]
        charts.append(chart(f"{title}, each rank", lines, x_scale=x_scale, y_scale=scale, band=band))
    return charts


def coloured(named: Sequence[int]) -> list[tuple[int, int]]:
    """(colour, rank) of those that stand out among many, the most striking colour first."""
    return list(zip((3, 1, 4, 2, 5, 6, 0, 7), named, strict=False))


def loss_spark(records: Sequence[Record]) -> Markup:
    """The loss of a run's present stage without axes."""
    stage = records[-1].get("stage") if records else None
    return sparkline(_points([r for r in records if r.get("stage") == stage], "loss", "step", None))


def _points(records: Sequence[Record], key: str, over: Over, starts: Mapping[str, float] | None) -> Points:
    found = []
    for record in records:
        x, y = _x(record, over, starts), record.get(key)
        if isinstance(y, int | float) and math.isfinite(x) and (not found or x >= found[-1][0]):
            found.append((x, float(y)))
    return found


def _x(record: Record, over: Over, starts: Mapping[str, float] | None) -> float:
    """Seconds of training, or steps from the run's beginning: stage 2 counts on from where stage 1 ended."""
    value = record.get("elapsed_s" if over == "time" else "step")
    if not isinstance(value, int | float):
        return math.nan
    return value + (starts["step"] if over == "step" and starts and record.get("stage") == 2 else 0)


def _starts(records: Sequence[Record]) -> dict[str, float] | None:
    """Where stage 2 begins; None before."""
    ended = [record for record in records if record.get("stage") == 1]
    if not ended or len(ended) == len(records):
        return None
    last = ended[-1]
    return {"step": last.get("total") or last.get("step") or 0, "elapsed_s": last.get("elapsed_s") or 0.0}


def _band(
    ranks: Sequence[Sequence[Record]], key: str, over: Over, starts: Mapping[str, float] | None
) -> tuple[Band, Points]:
    """(what lies between the least and the greatest rank, the median) at the steps that most of them logged."""
    at: dict[tuple[Any, Any], list[tuple[float, float]]] = {}
    for records in ranks:
        for record in records:
            for point in _points([record], key, over, starts):
                at.setdefault((record.get("stage"), record.get("step")), []).append(point)
    found = sorted(([x for x, _ in points], [y for _, y in points]) for points in at.values())
    usual = thinned([(xs[0], ys) for xs, ys in found if 2 * len(ys) >= len(ranks)], MOST_POINTS_OF_A_RANK)
    return Band([(x, min(ys), max(ys)) for x, ys in usual]), [(x, statistics.median(ys)) for x, ys in usual]
