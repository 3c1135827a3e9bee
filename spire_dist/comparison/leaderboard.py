"""The tables and the picture of a comparison: what was run here, and, apart from it, what was published."""

import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

from spire_dist.comparison.chart import draw
from spire_dist.comparison.methods import Own, read_methods
from spire_dist.comparison.tables import table
from spire_dist.files import replacing, write_json
from spire_dist.results import fsc
from spire_dist.results.runs import read_json

MASKS = ("masked", "unmasked")
HEADER = (
    "run here", "seeds", *(f"{mask}: {what}" for mask in MASKS for what in ("AUC", "std", "median")),
    *(f"per image, {mask}" for mask in MASKS), "Rand index", "parts: moving", "parts: each",
    "training, s",
)  # fmt: skip
NOTE = (
    "AUC of the per-conformation FSC by the benchmark's shells: mean over conformations, std and median over them, inside the "
    "set's mask and without it; per image: mean over single images. Of several seeds the mean (lowest-highest). Rand index: "
    "adjusted, of a mixture of Gaussians on the latents against true states, where these are few. Parts: the same index of our "
    "Gaussians' parts against the groups that move or come and go in truth, both as moving and fixed, and each by itself."
)

STAGE_1 = "stage 1"
"""Among the earlier points of a run of ours, its first stage as it ended."""

Row = dict[str, Any]
"""A line of the table: name, label, lists with a number for each seed (`masked`, `masked std`, ..., `rand`, `parts each`,
`training_s`)."""


def write_leaderboard(out: Path, data: Path, scores: Sequence[dict]) -> str:
    """benchmark.json, .md and .png in `out` from the runs' score.json's, at least one; returns the text of the .md."""
    rows = list(leaderboard_rows(scores))
    about = describe_data(data, scores[0])
    text = "\n".join(lines(about, rows, scores)) + "\n"
    result = {"data": about, "rows": rows, "runs": list(scores), "published": read_published()}
    write_json(out / "benchmark.json", result)
    with replacing(out / "benchmark.md") as path:
        path.write_text(text)
    with replacing(out / "benchmark.png") as path:
        draw(path, rows, scores, about["ceiling"])
    return text


def leaderboard_rows(scores: Sequence[dict]) -> Iterator[Row]:
    """Ours, our stage 1, the ablations and rivals, then what a rigid map reaches."""
    for name, method in read_methods().items():
        runs = [score for score in scores if score["method"] == name]
        if runs:
            yield _row(name, method.label, [(run["seed"], run["result"], run["training_s"]) for run in runs])
        if runs and name == "ours":
            ends = [(run, point) for run in runs for point in run["earlier"] if point["at"] == STAGE_1]
            early = [(run["seed"], point["result"], point["training_s"]) for run, point in ends]
            yield _row("stage-1", "- its stage 1 alone", early)
    own = [score for score in scores if isinstance(read_methods().get(score["method"]), Own)]
    if own:
        yield _row("consensus", "consensus, one rigid map", [(None, own[0]["result"], None)], "consensus")
    yield _row("average", "average of the true maps", [(None, scores[0]["result"], None)], "average")


def _row(name: str, label: str, runs: Sequence[tuple[int | None, dict, float | None]], which: str = "model") -> Row:
    """`runs`: seed, result of `score`, seconds of training."""
    row: Row = {"name": name, "label": label, "seeds": [seed for seed, _, _ in runs if seed is not None]}
    results = [result for _, result, _ in runs]
    for mask in MASKS:
        for kind, ending in (("mean", ""), ("std", " std"), ("median", " median")):
            row[mask + ending] = _numbers(results, f"per_conformation/{which}_{mask}", kind)
        row[f"per image {mask}"] = _numbers(results, f"per_image/{which}_{mask}", "mean")
    classes = [result["classes"]["adjusted_rand_index"] for result in results if "classes" in result]
    row["rand"] = classes if which == "model" else []
    parts = [result["parts"] for result in results if "parts" in result and which == "model"]
    row["parts moving"], row["parts each"] = ([found[key] for found in parts] for key in ("merged", "unmerged"))
    row["training_s"] = [seconds for _, _, seconds in runs if seconds is not None]
    return row


def _numbers(results: Sequence[dict], name: str, kind: str) -> list[float]:
    return [result["scores"][name][kind] for result in results if name in result["scores"]]


def describe_data(data: Path, run: dict) -> dict:
    """The set, as one of the runs on it has it: images, box, and how it was simulated where it was."""
    result = run["result"]
    return {
        "folder": str(data),
        "images": run["images"],
        "box": result["box"],
        "pixel_size_a": result["pixel_size_a"],
        "conformations": len(result["conformations"]),
        "mask": result["mask"],
        "ceiling": result["ceiling"],
        "simulation": read_json(data / "simulation.json") or None,
    }


def lines(about: dict, rows: Sequence[Row], scores: Sequence[dict]) -> Iterator[str]:
    """The page."""
    yield f"# Methods on {Path(about['folder']).name}"
    yield ""
    yield (
        f"{about['images']} images of {about['box']} px at {about['pixel_size_a']:.4g} Å/px, {about['conformations']} "
        f"conformations; {_origin(about['simulation'])}"
    )
    yield from dict.fromkeys(_machine(score["machine"]) for score in scores)
    yield ""
    yield "## Run here, on these images"
    yield ""
    yield from table(HEADER, [*map(_cells, rows), _ceiling(about["ceiling"])])
    yield ""
    yield NOTE
    if about["mask"] is None:
        yield "The set has no mask."
    else:
        yield f"Mask: {about['mask']['file']}, {100 * about['mask']['share_of_box']:.1f} % of the box."
    yield ""
    yield from settings_lines(scores)
    yield ""
    yield from published_lines()


def settings_lines(scores: Sequence[dict]) -> Iterator[str]:
    """What each method was run with."""
    labels = {name: method.label.removeprefix("- ") for name, method in read_methods().items()}
    for name in dict.fromkeys(score["method"] for score in scores):
        settings = next(score["settings"] for score in scores if score["method"] == name)
        if "stage1" not in settings:
            epochs = f", {settings['epochs']} epoch(s)" if "epochs" in settings else ""
            yield f"- {labels[name]}: {settings['program']}{epochs}, `{' '.join(settings['options'])}`"
            continue
        first, second, latent = (settings[section] for section in ("stage1", "stage2", "latent"))
        yield (
            f"- {labels[name]}: {first['gaussians']} and {second['gaussians']} Gaussians, {first['epochs']:g} and "
            f"{second['epochs']:g} epochs, {settings['parts']['anchors']} anchors, latent of {latent['dimension']} numbers "
            f"({latent['kind']})"
        )


def published_lines() -> Iterator[str]:
    """The published table, which has a header and columns of its own."""
    published = read_published()
    yield "## Published, not run here"
    yield ""
    header = ("published", *(f"{name}, {published['box']} px" for name in published["sets"]))
    yield from table(header, [(method, *map(_published, row)) for method, row in published["scores"].items()])
    yield ""
    yield (
        f"{published['source']}: mean (std over conformations) median of the AUC; at most {fsc.ceiling(published['box']):.4f} "
        f"at {published['box']} px. Whether it is masked is not stated. Images, noise and states are those of the deposited "
        "sets: of a set made here, compare the order of methods, not the numbers."
    )


def read_published() -> dict[str, Any]:
    """`published.toml`: source, box, sets, and of each method (mean, std, median) for each set."""
    return tomllib.loads(files("spire_dist").joinpath("comparison/published.toml").read_text())


def _published(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    average, deviation, *median = numbers
    return " ".join([f"{average:.3f} ({deviation:.3f})", *(f"{number:.3f}" for number in median)])


def _cells(row: Row) -> list[str]:
    numbers = []
    for mask in MASKS:
        numbers += [
            _spread(row[mask], 4),
            *(_spread(row[f"{mask} {kind}"], 4, ends=False) for kind in ("std", "median")),
        ]
    numbers += [_spread(row[f"per image {mask}"], 4) for mask in MASKS]
    return [
        row["label"],
        str(len(row["seeds"]) or "-"),
        *numbers,
        *(_spread(row[name], 3) for name in ("rand", "parts moving", "parts each")),
        _spread(row["training_s"], 0),
    ]


def _spread(numbers: Sequence[float], digits: int, *, ends: bool = True) -> str:
    """0.4731, or of several 0.4731 (0.4710-0.4752), without its `ends` 0.4731."""
    if not numbers:
        return "-"
    text = f"{mean(numbers):.{digits}f}"
    return text if len(numbers) == 1 or not ends else f"{text} ({min(numbers):.{digits}f}-{max(numbers):.{digits}f})"


def _ceiling(ceiling: float) -> list[str]:
    cells = ["largest possible", *["-"] * (len(HEADER) - 1)]
    for column in (2, 5, 8, 9):  # the AUCs
        cells[column] = f"{ceiling:.4f}"
    return cells


def _origin(simulation: dict | None) -> str:
    if simulation is None:
        return "a deposited set"
    recipe = f"recipe {simulation['recipe']}" if simulation.get("recipe") else "simulated"
    return f"{recipe}, SNR {simulation['snr']} {simulation['snr_at']} cropping, seed {simulation['seed']}"


def _machine(machine: dict) -> str:
    """The machine of a run without the load it had."""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{gpu}; {versions}"
