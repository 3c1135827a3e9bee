"""The report's figures, each a function from numbers to an SVG that takes its ink from the page (light or dark).

Pictures of many pixels (maps, scatter) are embedded in the SVG or made as PNG; nothing refers to anything outside.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from spire_dist.results import fsc

INK = "#010203"
"""Drawn in this colour, shown in the page's own: `svg` replaces it by `currentColor`."""
BLUE, ORANGE, GREEN, RED, GREY = "#3f8ee0", "#e8913a", "#3fae78", "#dd5b70", "#8a94a3"
STAGE_COLOURS = {1: ORANGE, 2: BLUE}


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` × `height` inches, with its panels from left to right."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    panels = canvas.subplots(1, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        for item in (*axes.spines.values(), axes.xaxis.label, axes.yaxis.label, axes.title):
            item.set_color(INK)
        axes.tick_params(colors=INK, labelsize=8, length=3)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.grid(color=GREY, alpha=0.18, linewidth=0.6)
        axes.set_axisbelow(True)
    return canvas, panels


def svg(canvas: Figure, name: str) -> str:
    """The figure as an `<svg>` element to put into a page; `name` keeps its inner references apart from others'."""
    for axes in canvas.axes:
        axes.set_title(axes.get_title(), fontsize=9.5, color=INK)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        canvas.savefig(text, format="svg", transparent=True, dpi=150, metadata={"Date": None, "Creator": None})
    inline = text.getvalue()[text.getvalue().index("<svg") :]
    inline = re.sub(r"<metadata>.*?</metadata>", "", inline, flags=re.DOTALL)
    inline = re.sub(r' (width|height)="[\d.]+pt"', "", inline, count=2)
    inline = inline.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace(
        ' xmlns="http://www.w3.org/2000/svg"', ""
    )
    inline = inline.replace("xlink:href", "href").replace(INK, "currentColor")
    inline = re.sub(
        r'id="(figure|axes|text|line2d|patch|matplotlib|PathCollection|legend|xtick|ytick|QuadMesh)[^"]*"', "", inline
    )
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", inline)  # the page's own letters


def legend(axes: Axes, place: Literal["best", "lower left"] = "best") -> None:
    """A frameless legend in the page's ink."""
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=1.8, loc=place)


def latent_scatter(points: NDArray, path: NDArray, share: NDArray, label: NDArray | None) -> Figure:
    """Latents along principal axes [N, 2 or 3] as density, or coloured by label [N], with the path [K, 2 or 3] on them.

    share: of the variance, on each axis.
    """
    pairs = [(0, 1)] if points.shape[1] == 2 else [(0, 1), (0, 2)]
    panels = [(pair, None) for pair in pairs] + ([((0, 1), label)] if label is not None else [])
    canvas, all_axes = figure(3.5 * len(panels), 3.4, columns=len(panels))
    for axes, ((i, j), colour) in zip(all_axes, panels, strict=True):
        axes.grid(visible=False)
        if colour is None:
            spans = [np.percentile(points[:, k], [0.1, 99.9]) for k in (i, j)]
            spans = [(low - 0.08 * (high - low) - 1e-6, high + 0.08 * (high - low) + 1e-6) for low, high in spans]
            bins = int(np.clip(np.sqrt(len(points)) / 1.5, 24, 110))
            counts, x, y = np.histogram2d(points[:, i], points[:, j], bins=bins, range=spans)
            shown = np.ma.masked_less(counts.T, 1)
            axes.pcolormesh(x, y, shown, cmap="GnBu_r", norm=LogNorm(0.5, max(counts.max(), 2)), rasterized=True)
            closed = np.concatenate([path, path[:1]])
            axes.plot(closed[:, i], closed[:, j], color=RED, linewidth=1.2, alpha=0.9)
            axes.plot(path[:, i], path[:, j], "o", color=RED, markersize=3)
            axes.plot(path[:1, i], path[:1, j], "o", color=RED, markersize=7, markerfacecolor="none")
            axes.set_title(f"{len(points):,} particles; red: the path shown above" if i + j == 1 else "")
        else:
            few = np.random.default_rng(0).permutation(len(points))[:20_000]
            axes.scatter(
                *points[few][:, [i, j]].T, c=colour[few], cmap="turbo", s=3, alpha=0.6, linewidths=0, rasterized=True
            )
            axes.set_title(f"coloured by label ({len(np.unique(colour))} of them)")
        axes.set_xlabel(f"axis {i + 1} ({100 * share[i]:.0f} % of the variance)")
        axes.set_ylabel(f"axis {j + 1} ({100 * share[j]:.0f} %)")
    return canvas


def scores(evaluation: dict) -> Figure:
    """FSC of the model against the truth, mean and spread over conformations, with rigid maps; and the AUC of each."""
    where = "masked" if evaluation["mask"] else "unmasked"
    names = {
        "model": (BLUE, "model"),
        "average": (GREEN, "state-averaged truth"),
        "consensus": (ORANGE, "run's consensus"),
    }
    canvas, (left, right) = figure(8.8, 3.2, columns=2)
    frequency = np.arange(evaluation["box"] // 2) / (evaluation["box"] * evaluation["pixel_size_a"])
    for name, (colour, text) in names.items():
        row = evaluation["scores"][f"per_conformation/{name}_{where}"]
        curve, spread = np.array(row["mean_curve"]), np.array(row["std_curve"])
        left.plot(
            frequency,
            curve,
            color=colour,
            label=f"{text}, {row['mean']:.4f}",
            linewidth=1.8 if name == "model" else 1.2,
        )
        left.fill_between(
            frequency, curve - spread, np.minimum(curve + spread, 1), color=colour, alpha=0.15, linewidth=0
        )
        right.plot(evaluation["conformations"], row["each"], "o-", color=colour, markersize=3, linewidth=0.8)
    right.axhline(evaluation["ceiling"], color=GREY, linestyle="--", linewidth=1)
    right.annotate(f"largest possible, {evaluation['ceiling']:.4f}", (0.99, evaluation["ceiling"]), (0, -3), fontsize=8,
                   xycoords=("axes fraction", "data"), textcoords="offset points",
                   ha="right", va="top", color=INK)  # fmt: skip
    left.set(
        ylim=(0, 1.02), ylabel=f"FSC with the truth, {where}", title="mean over conformations ± standard deviation"
    )
    right.set(xlabel="conformation", ylabel=f"AUC, {where}", title="area under the curve of each conformation")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    resolution_axis(left, frequency)
    legend(left, "lower left")
    return canvas


def training(records: list[dict]) -> Figure:
    """Loss and images per second against time, both stages."""
    canvas, (top, bottom) = figure(8.8, 3.1, columns=2)
    unit, label = (60, "minutes") if records[-1]["elapsed_s"] < 7200 else (3600, "hours")
    for stage, colour in STAGE_COLOURS.items():
        rows = [r for r in records if r["stage"] == stage]
        if rows:
            time = [r["elapsed_s"] / unit for r in rows]
            top.plot(time, [r["loss"] for r in rows], color=colour, label=f"stage {stage}")
            bottom.plot(time, [r["images_per_s"] for r in rows], color=colour)
    losses = np.array([r["loss"] for r in records])
    low, high = losses.min(), np.percentile(losses, 97)
    top.set(
        ylabel="mean squared residual per pixel", xlabel=f"time ({label})", title="loss (1: nothing but noise is left)"
    )
    if high > low:
        top.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    top.ticklabel_format(axis="y", useOffset=False)
    bottom.set(ylabel="images per second", xlabel=f"time ({label})", title="speed", ylim=(0, None))
    legend(top)
    return canvas


def part_counts(study: dict) -> Figure:
    """Stability and gap against the number of clusters, of a run's stage1/parts.json, the chosen one marked."""
    canvas, (left, right) = figure(6.4, 2.4, columns=2)
    counts, measures = [m["count"] for m in study["measures"]], study["measures"]
    left.plot(counts, [m["stability"] for m in measures], "o-", color=BLUE, markersize=4, label="data")
    left.plot(counts, [m["stability_by_chance"] for m in measures], "--", color=GREY, label="structureless")
    errors = [m["gap_error"] for m in measures]
    right.errorbar(counts, [m["gap"] for m in measures], errors, fmt="o-", color=BLUE, markersize=4, capsize=2)
    left.set(ylim=(min(0, *left.get_ylim()), 1.05), title="stability (adjusted Rand index)")
    right.set(title="gap statistic")
    for axes in (left, right):
        axes.axvline(study["chosen"], color=ORANGE, linewidth=1.2)
        axes.set_xlabel("clusters (line: chosen)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(left, "lower left")
    return canvas


def half_maps(found: fsc.MapFsc) -> Figure:
    """FSC of the two half maps of the consensus, with both thresholds."""
    canvas, (axes,) = figure(4.3, 3.0)
    axes.plot(found.frequencies, found.curve, color=ORANGE)
    for level, at in ((0.143, found.resolution_0143), (0.5, found.resolution_05)):
        axes.axhline(level, color=GREY, linestyle="--", linewidth=0.8)
        axes.annotate(f"{level}: {at:.3g} Å", (0, level), (4, 3), fontsize=8, color=INK, textcoords="offset points")
    axes.set(ylim=(min(-0.05, found.curve.min()), 1.02), ylabel="FSC, unmasked", title="half maps of the consensus")
    resolution_axis(axes, found.frequencies)
    return canvas


def data_facts(defocus_a: NDArray, rotations: NDArray, shifts_a: NDArray) -> Figure:
    """Defocus [N] Å, view directions of rotations [N, 3, 3], and shifts [N, 2] Å of the particles."""
    canvas, (left, middle, right) = figure(8.8, 2.7, columns=3)
    left.hist(defocus_a / 1e4, bins=40, color=BLUE, alpha=0.85)
    left.set(xlabel="mean defocus (μm, underfocus)", ylabel="particles")
    towards = rotations[:, 2]  # the volume's direction that looks along the beam
    azimuth = np.rad2deg(np.arctan2(towards[:, 1], towards[:, 0]))
    height = np.clip(towards[:, 2], -1, 1)  # equal areas of this plane are equal areas of the sphere
    counts, x, y = np.histogram2d(azimuth, height, bins=(36, 18), range=[(-180, 180), (-1, 1)])
    mesh = middle.pcolormesh(x, y, counts.T, cmap="GnBu_r", vmin=0, rasterized=True)
    bar = canvas.colorbar(mesh, ax=middle, pad=0.02)
    bar.ax.tick_params(colors=INK, labelsize=7)
    middle.set(xlabel="azimuth of the view (degrees)", ylabel="cos tilt", xticks=[-180, -90, 0, 90, 180])
    middle.grid(visible=False)
    few = np.random.default_rng(0).permutation(len(shifts_a))[:5000]
    right.scatter(*shifts_a[few].T, s=2, color=BLUE, alpha=0.35, linewidths=0, rasterized=True)
    right.set(xlabel="shift x (Å)", ylabel="shift y (Å)", aspect="equal")
    return canvas


def plot_evaluation(path: Path, evaluation: dict) -> None:
    """The scores as a PNG on white, for a talk or a notebook."""
    canvas = scores(evaluation)
    canvas.savefig(path, dpi=150, facecolor="white", format="png")


def resolution_axis(axes: Axes, frequency: NDArray) -> None:
    """Frequencies in 1/Å below, labelled by their resolution in Å."""
    axes.set_xlim(0, frequency[-1])
    axes.set_xlabel("resolution (Å)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "∞" if value <= 0 else f"{1 / value:.3g}"))


def grey_png(sections: Iterable[NDArray], columns: int, low: float, high: float, zoom: int = 1, gap: int = 3) -> bytes:
    """Sections [D, D] side by side as one grey PNG, y up, `low` black and `high` white, enlarged `zoom` times."""
    tiles = [np.clip((s[::-1] - low) / max(high - low, 1e-12), 0, 1) for s in sections]
    tiles = [np.pad(np.asarray(ndimage.zoom(t, zoom, order=1)), gap, constant_values=np.nan) for t in tiles]
    blank = np.full_like(tiles[0], np.nan)
    tiles += [blank] * (-len(tiles) % columns)
    sheet = np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])
    grey = (255 * np.nan_to_num(sheet)).astype(np.uint8)
    alpha = np.where(np.isnan(sheet), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([grey, alpha], axis=2), "LA").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
