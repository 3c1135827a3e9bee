"""Line charts for the live page: SVG as text, drawn here at once, that takes its colours from the page's style sheet.

Nothing here has a `style` attribute: the page's content policy would refuse it. `live.js` reads the numbers under the pointer
back from a path and the chart's `data-` attributes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from markupsafe import Markup, escape

Item = TypeVar("Item")
Points = Sequence[tuple[float, float]]
Scale = Literal["number", "share", "hours"]

WIDTH, HEIGHT = 360.0, 196.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 30.0, 24.0
OUTLIERS = 0.01
"""Share of the values at the top that may lie outside of a chart: the first losses of a run hide all that follows."""
X_TICKS, Y_TICKS = 6, 4
"""At most so many numbers along an axis; rounding them leaves half of it at least."""


@dataclass(frozen=True)
class Line:
    """A curve: `points` (x, y), x ascending. `kind` is its class in the style sheet."""

    name: str
    points: Points
    kind: str = "own"


@dataclass(frozen=True)
class Band:
    """What many curves lie between: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_scale: Scale = "number",
    y_scale: Scale = "number",
    band: Band | None = None,
    breaks: Iterable[tuple[float, str]] = (),
    from_zero: bool = True,
) -> Markup:
    """A chart of `lines`, which may be empty. `breaks` are places on the x axis to mark with a name (where a stage begins)."""
    low_x, high_x = _span([x for line in lines for x, _ in line.points])
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    values += [y for _, *both in (band.points if band else ()) for y in both if math.isfinite(y)]
    y_ticks = _y_ticks(values, y_scale, from_zero)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low_x) / (high_x - low_x)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (min(max(y, low_y), high_y) - low_y) / (high_y - low_y)

    parts = [f'<text class="title" x="{LEFT - 40:g}" y="14">{escape(title)}</text>']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT:g} {y_at(tick):.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 6:g}" y="{y_at(tick) + 3.5:.1f}">{told(tick, y_scale)}</text>')
    for tick in ticks(low_x, high_x, X_TICKS):
        parts.append(f'<text class="tick x" x="{x_at(tick):.1f}" y="{HEIGHT - 8:g}">{told(tick, x_scale)}</text>')
    for x, name in breaks:
        if low_x < x < high_x:
            parts.append(f'<path class="break" d="M{x_at(x):.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"/>')
            parts.append(f'<text class="break" x="{x_at(x) + 4:.1f}" y="{TOP + 9:g}">{escape(name)}</text>')
    if band and band.points:
        there = "L".join(f"{x_at(x):.1f} {y_at(high):.1f}" for x, _, high in band.points)
        back = "L".join(f"{x_at(x):.1f} {y_at(low):.1f}" for x, low, _ in reversed(band.points))
        parts.append(f'<path class="band" d="M{there}L{back}Z"/>')
    for line in lines:
        for piece in _pieces(line.points):
            route = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in piece)
            end = "h.1" if len(piece) == 1 else ""  # else a single point would not be drawn
            parts.append(f'<path class="line {line.kind}" data-name="{escape(line.name)}" d="M{route}{end}"/>')
    if not values:
        parts.append(
            f'<text class="empty" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT / 2:g}">nothing logged yet</text>'
        )
    frame = f"{LEFT:g} {WIDTH - RIGHT:g} {TOP:g} {HEIGHT - BOTTOM:g}"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}" data-frame="{frame}" '
        f'data-x="{low_x:.10g} {high_x:.10g} {x_scale}" data-y="{low_y:.10g} {high_y:.10g} {y_scale}">{"".join(parts)}</svg>'
    )


def sparkline(points: Points, width: float = 120, height: float = 28) -> Markup:
    """A curve without axes; empty for fewer than two points."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return Markup("")
    (low_x, high_x), (low, high) = _span([x for x, _ in points]), _span(_without_outliers([y for _, y in points]))
    route = "L".join(
        f"{width * (x - low_x) / (high_x - low_x):.1f} {2 + (height - 4) * (1 - (min(y, high) - low) / (high - low)):.1f}"
        for x, y in points
    )
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="line own" d="M{route}"/></svg>'
    )


def told(value: float, scale: Scale) -> str:
    """A number beside an axis: 1200 -> "1,200", 0.25 as a share -> "25 %", 90 000 s -> "25 h"."""
    if scale == "share":
        return f"{100 * value:.3g} %"
    if scale == "hours":
        return (
            f"{value / 3600:.3g} h" if value >= 3600 else f"{value / 60:.3g} min" if value >= 60 else f"{value:.3g} s"
        )
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    step = _round_step((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of them, evenly, the first and the last one among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _y_ticks(values: list[float], scale: Scale, from_zero: bool) -> list[float]:
    """Round numbers of which the first and the last enclose the values, outliers at the top apart."""
    low, high = _span(_without_outliers(values))
    low = min(low, 0.0) if from_zero else low
    if scale == "share":
        high = max(high, 0.1)
    step = _round_step((high - low) / Y_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5 × 10^k that is not below `step`."""
    unit = 10.0 ** math.floor(math.log10(step))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= step * (1 - 1e-9))


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value, never equal."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else (low, low + (abs(low) or 1.0))


def _without_outliers(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return ordered[: max(1, math.ceil(len(ordered) * (1 - OUTLIERS)))]


def _pieces(points: Points) -> Iterable[list[tuple[float, float]]]:
    """Stretches of finite values: a loss that is no number leaves a gap."""
    piece: list[tuple[float, float]] = []
    for x, y in points:
        if math.isfinite(y):
            piece.append((x, y))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece
