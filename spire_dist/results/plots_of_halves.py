"""The figures of `validate`: the halves' correlations, and whose differences are alike. Called by validate and report."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spire_dist.results import plots

CURVES = {
    "matched": (plots.BLUE, "the same conformation"),
    "mismatched": (plots.GREY, "different conformations"),
    "consensus": (plots.ORANGE, "the two consensus maps"),
    "differences": (plots.RED, "differences from the mean"),
}


def validation(result: dict) -> Figure:
    """FSC between the halves; likeness of their maps' differences from the mean; mean FSC of each map."""
    canvas, (left, middle, right) = plots.figure(11.4, 3.3, columns=3)
    frequencies, matched = np.array(result["frequencies"]), np.array(result["curves"]["matched"])
    for name, (colour, text) in CURVES.items():
        found = result["resolutions_a"][name]["0.143"]
        left.plot(
            frequencies[1:], result["curves"][name][1:], color=colour, label=f"{text}, {found:.3g} Å", linewidth=1.6
        )
    spread = np.array(result["spread"])
    left.fill_between(frequencies, matched - spread, matched + spread, color=plots.BLUE, alpha=0.15, linewidth=0)
    left.axhline(0.143, color=plots.GREY, linestyle="--", linewidth=0.8)
    lowest = min(min(result["curves"][name][1:]) for name in CURVES)
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

    numbers = range(len(result["maps"]))
    for name in ("matched", "mismatched", "differences"):
        colour, text = CURVES[name]
        right.plot(
            numbers, [row["means"][name] for row in result["maps"]], "o-", markersize=3, color=colour, label=text
        )
    right.set(xlabel="map along the path", ylabel="mean FSC over all shells", title="each map", ylim=(None, 1.02))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    plots.legend(right)
    return canvas


def plot_validation(path: Path, result: dict) -> None:
    """The same as a PNG on white."""
    validation(result).savefig(path, dpi=150, facecolor="white", format="png")
