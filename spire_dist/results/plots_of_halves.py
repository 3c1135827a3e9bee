"""The figures of `validate`: the halves' correlations, and whose differences are alike. Called by validate and report."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spire_dist.results import plots

CURVES = {
    "matched": (plots.BLUE, "the same conformation"),
    "mismatched": (plots.GREY, "different conformations"),
    "consensus": (plots.ORANGE, "the two consensus maps"),
    "differences": (plots.RED, "differences from the mean"),
}


def validation(result: dict) -> Figure:
    """FSC between the halves; likeness of their maps' differences from the mean; resolution of each map."""
    canvas, (left, middle, right) = plots.figure(11.4, 3.3, columns=3)
    frequencies, matched = np.array(result["frequencies"]), np.array(result["curves"]["matched"])
    for name, (colour, text) in CURVES.items():
        found = result["resolutions_a"][name]["0.143"]
        left.plot(frequencies, result["curves"][name], color=colour, label=f"{text}, {found:.3g} Å", linewidth=1.6)
    spread = np.array(result["spread"])
    left.fill_between(frequencies, matched - spread, matched + spread, color=plots.BLUE, alpha=0.15, linewidth=0)
    left.axhline(0.143, color=plots.GREY, linestyle="--", linewidth=0.8)
    lowest = min(min(result["curves"][name]) for name in CURVES)
    left.set(ylim=(min(-0.05, lowest), 1.02), ylabel="FSC of the two halves, masked")
    left.set_title("maps of two halves; Å at 0.143")
    plots.resolution_axis(left, frequencies)
    plots.legend(left, "lower left")

    likeness = np.array(result["likeness"])
    middle.grid(visible=False)
    shown = middle.imshow(likeness, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower")
    bar = canvas.colorbar(shown, ax=middle, pad=0.02)
    bar.ax.tick_params(colors=plots.INK, labelsize=7)
    middle.set(xlabel="map of half 2", ylabel="map of half 1", title="likeness of differences from the mean")

    rows = result["maps"]
    for name, colour, text in (("masked", plots.BLUE, "matched"), ("mismatched", plots.GREY, "with others")):
        for level, style in (("0.143", "-"), ("0.5", ":")):
            values = [row[name][level] for row in rows]
            right.plot(
                range(len(rows)), values, style, marker="o", markersize=3, color=colour, label=f"{text}, {level}"
            )
    right.axhline(2 * result["pixel_size_a"], color=plots.GREY, linestyle="--", linewidth=0.8)
    right.set(xlabel="map along the path", ylabel="resolution (Å)", title="each map; dashes: Nyquist")
    right.invert_yaxis()
    plots.legend(right)
    return canvas


def plot_validation(path: Path, result: dict) -> None:
    """The same as a PNG on white."""
    validation(result).savefig(path, dpi=150, facecolor="white", format="png")
