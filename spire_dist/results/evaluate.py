"""`evaluate`: scores of a run against a set with known truth. Called by `spire-dist evaluate`.

Two scores, as the benchmark has them, each with its mask and without:

    per conformation   the map at the latent of the image nearest to the mean latent of a conformation, against the
                       true map of that conformation
    per image          the maps at the latents of about `images` images, evenly spaced in the order of the input file

A score is the area under the benchmark's FSC (see `fsc`). It means little alone: beside it stand the score of the run's
own consensus map, of the state-averaged truth (the best that one rigid map could be) and the largest the box allows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError
from spire_dist.files import replacing
from spire_dist.maps import read_map
from spire_dist.progress import progress
from spire_dist.results import fsc
from spire_dist.results.agreement import Agreement, parts_agreement
from spire_dist.results.classes import mixture_index
from spire_dist.results.plots import plot_evaluation
from spire_dist.results.runs import decode_in_batches, input_rows
from spire_dist.results.truth import Truth, open_truth, read_labels
from spire_dist.training.run import FinishedRun, load_run

Curves = dict[tuple[int, ...], NDArray]
"""By conformation, or by the image's row of the input (`input_rows`): FSC [D/2]."""
FOLDER = "evaluation"
"""Curves go to this folder of the run directory, numbers to `evaluation.json`, the picture to `evaluation.png`."""


class Scorable(Protocol):
    """What can be scored: a `FinishedRun`, or another method's latents of the same store with its maps at them."""

    @property
    def store(self) -> ParticleStore:
        """The particles."""
        ...

    @property
    def latents(self) -> NDArray[np.float32]:
        """[N, L], in the store's row order."""
        ...

    @property
    def box(self) -> int:
        """Side of the maps in voxels."""
        ...

    @property
    def pixel_size(self) -> float:
        """Å per voxel."""
        ...

    @property
    def consensus(self) -> Path | None:
        """The one rigid map it began with, where it has one."""
        ...

    def volumes(self, latents: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """The maps [D, D, D] at latents [B, L], one after another."""
        ...


def evaluate(
    run: Path, truth: Path, *, conformations: int | None = None, images: int = 100, masked: bool = True
) -> dict:
    """Score the run in directory `run` against the folder `truth`; evaluation.json, curves and a plot go into the run.

    conformations  how many, evenly spaced over those that have particles; None: all
    images         about how many images the per-image score takes; 0: none
    masked         also score inside init_mask/mask.mrc, where there is one

    Returns what evaluation.json holds; `table` prints it. Raises SourceError for a truth that is missing or does not
    fit.
    """
    finished = load_run(run)
    result, curves = score(finished, truth, conformations=conformations, images=images, masked=masked)
    if "parts" in result and (run / "stage1").is_dir():
        result["parts_of_stage_1"] = score_parts(load_run(run, stage=1), truth, conformations)
    with replacing(run / FOLDER) as folder:
        _save_curves(folder, curves)
    with replacing(run / "evaluation.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n")

    with replacing(run / "evaluation.png") as path:
        plot_evaluation(path, result)
    return result


def score(
    run: FinishedRun, truth_folder: Path, *, conformations: int | None = None, images: int = 100, masked: bool = True
) -> tuple[dict, dict[str, Curves]]:
    """The numbers of `evaluate` (ready for JSON) and its curves, {"per_conformation/model_masked": {(state,): [D/2]}}."""
    result, curves = score_maps(run, truth_folder, conformations=conformations, images=images, masked=masked)
    if (truth_folder / "residues.npz").exists():
        result["parts"] = score_parts(run, truth_folder, conformations)
    return result, curves


def score_maps(
    model: Scorable,
    truth_folder: Path,
    *,
    conformations: int | None = None,
    images: int = 100,
    masked: bool = True,
    classes: bool = True,
) -> tuple[dict, dict[str, Curves]]:
    """`score` without the parts, which others' models have none of, and on demand without `classes`, which take a while."""
    if images < 0 or (conformations is not None and conformations < 1):
        raise ConfigError(f"conformations {conformations}, images {images}; give at least 1 and 0")
    truth = open_truth(truth_folder, model.box, model.pixel_size)
    labels = read_labels(truth.folder, model.store)
    if not 0 <= labels.min() <= labels.max() < len(truth.maps):
        found = f"labels {labels.min()} to {labels.max()}, but {len(truth.maps)} true maps"
        raise SourceError(f"{truth.folder}: {found}; there must be one map per label, from 0")
    mask = truth.mask() if masked else None
    masks = {"unmasked": None} | ({"masked": mask} if mask is not None else {})
    counts = np.bincount(labels, minlength=len(truth.maps))
    states = spread(np.flatnonzero(counts), conformations)
    own = {} if model.consensus is None else {"consensus": _own_map(model.consensus, model.box)}
    rigid = own | {"average": truth.average(counts)}

    particles = nearest_to_means(model.latents, labels, states)
    pairs = {(int(state),): (int(state), int(row)) for state, row in zip(states, particles, strict=True)}
    curves = _curves(model, truth, pairs, masks, rigid, "per_conformation")
    if images:
        index = model.store.source_index
        rows = every_nth(model.store.source * (index.max() + 1) + index, images)
        keys = map(tuple, input_rows(model.store, rows))
        pairs = {key: (int(labels[row]), int(row)) for key, row in zip(keys, rows, strict=True)}
        curves |= _curves(model, truth, pairs, masks, {}, "per_image")

    result = {
        "truth": str(truth.folder),
        "box": model.box,
        "pixel_size_a": model.pixel_size,
        "truth_box": truth.own_box,
        "latent_of_a_conformation": "of the image nearest to its mean",
        "mask": None if mask is None else {"file": "init_mask/mask.mrc", "share_of_box": float((mask > 0).mean())},
        "ceiling": fsc.ceiling(model.box),
        "scores": {name: _summary(group) for name, group in curves.items()},
        "conformations": [int(s) for s in states],
        "representatives": input_rows(model.store, particles),
    }
    if classes and (agreement := mixture_index(model.latents, labels)) is not None:
        result["classes"] = {"states": int(np.count_nonzero(counts)), "adjusted_rand_index": agreement}
    return result, curves


def score_parts(run: FinishedRun, truth_folder: Path, conformations: int | None = None) -> Agreement:
    """Agreement of a run's parts (of either stage) with the groups of residues.npz, over the conformations."""
    truth = open_truth(truth_folder, run.box, run.pixel_size)
    labels = read_labels(truth.folder, run.store)
    states = spread(np.unique(labels), conformations)
    centres, amplitudes = decode_in_batches(run, run.latents[nearest_to_means(run.latents, labels, states)])
    return parts_agreement(centres, amplitudes, run.widths, run.parts, truth.residues(), states)


def nearest_to_means(latents: NDArray, labels: NDArray, states: NDArray) -> NDArray[np.int64]:
    """Of each state, the row of the image whose latent is nearest (Euclid) to the mean latent of that state."""
    rows = []
    for state in states:
        members = np.flatnonzero(labels == state)
        own = latents[members].astype(np.float64)
        rows.append(members[((own - own.mean(axis=0)) ** 2).sum(axis=1).argmin()])
    return np.array(rows)


def every_nth(place: NDArray, images: int) -> NDArray[np.int64]:
    """Rows of the benchmark's images: every (N // images)-th by its `place` [N] in the input, so 101 of 335,240 for 100."""
    order = np.argsort(place, kind="stable")
    return order[np.arange(0, len(order), max(1, len(order) // images))]


def spread(items: NDArray, count: int | None) -> NDArray:
    """`count` of the items, evenly spaced with both ends; all for None."""
    if count is None or count >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, count).round().astype(int)]


def compare_maps(a: Path, b: Path, mask: Path | None = None) -> fsc.MapFsc:
    """FSC of two map files in the usual shells (round(r) = i), optionally inside a mask file, with resolutions in Å."""
    (first, pixel_size), (second, other) = read_map(a), read_map(b)
    if first.shape != second.shape or abs(pixel_size / other - 1) > 0.005:
        sizes = f"{len(first)} px × {pixel_size:.4g} Å and {len(second)} px × {other:.4g} Å"
        raise SourceError(f"{a} and {b}: {sizes}; both maps must have the same box and pixel size")
    return fsc.map_fsc(first, second, pixel_size, None if mask is None else read_map(mask)[0])


def table(result: dict) -> str:
    """The scores as lines for a terminal."""
    lines = [
        f"AUC of the FSC, box {result['box']} px × {result['pixel_size_a']:.3g} Å; at most {result['ceiling']:.4f}"
    ]
    lines.append(f"{'':38}{'mean':>8}{'std':>8}{'median':>8}{'n':>6}")
    for name, row in result["scores"].items():
        lines.append(f"{name:38}{row['mean']:8.4f}{row['std']:8.4f}{row['median']:8.4f}{row['count']:6d}")
    if result["mask"]:
        lines.append(f"mask: {result['mask']['file']}, {100 * result['mask']['share_of_box']:.1f} % of the box")
    if result["truth_box"] != result["box"]:
        lines.append(f"true maps Fourier-cropped from {result['truth_box']} px")
    if "classes" in result:
        classes = result["classes"]
        lines.append(
            f"mixture of {classes['states']} Gaussians on the latents against the true states, adjusted Rand index: "
            f"{classes['adjusted_rand_index']:.3f}"
        )
    if "parts" in result:
        parts = result["parts"]
        lines.append(
            f"parts against truth, adjusted Rand index: {parts['merged']:.3f} moving/fixed, "
            f"{parts['merged_by_model']:.3f} moving by the model's own measure, {parts['unmerged']:.3f} unmerged"
        )
        for part in parts["parts"]:
            lines.append(
                f"  part {part['part']:3d}: {part['gaussians']:6d} Gaussians, "
                f"moving in truth {part['moving_in_truth']:.2f}, displacement {part['displacement_a']:6.2f} Å, "
                f"variable share {part['variable_share']:.2f}"
            )
    return "\n".join(lines)


def _own_map(path: Path, box: int) -> NDArray:
    volume, _ = read_map(path)
    if len(volume) != box:
        raise SourceError(f"{path}: box {len(volume)} px, the run has {box}; it is not the run's own consensus")
    return volume


def _curves(model: Scorable, truth: Truth, pairs: dict, masks: dict, rigid: dict, kind: str) -> dict[str, Curves]:
    """Benchmark curves of the model, and of rigid maps, against the truth of each pair key -> (state, row)."""
    fixed = {(name, m): fsc.spectrum(volume, mask) for name, volume in rigid.items() for m, mask in masks.items()}
    curves: dict[str, Curves] = {f"{kind}/{name}_{m}": {} for name in ("model", *rigid) for m in masks}
    true_state, true_spectra = -1, {}
    volumes = model.volumes(model.latents[[row for _, row in pairs.values()]])
    shown = progress(zip(pairs.items(), volumes, strict=True), kind.replace("_", " "), total=len(pairs), unit="map")
    for (key, (state, _)), volume in shown:
        if state != true_state:
            true_map = truth.volume(state)
            true_state, true_spectra = state, {m: fsc.spectrum(true_map, mask) for m, mask in masks.items()}
        for m, mask in masks.items():
            curves[f"{kind}/model_{m}"][key] = fsc.benchmark_curve(true_spectra[m], fsc.spectrum(volume, mask))
            for name in rigid:
                curves[f"{kind}/{name}_{m}"][key] = fsc.benchmark_curve(true_spectra[m], fixed[name, m])
    return curves


def _summary(curves: Curves) -> dict:
    areas = [fsc.auc(curve) for curve in curves.values()]
    return {
        "mean": float(np.mean(areas)),
        "std": float(np.std(areas)),
        "median": float(np.median(areas)),
        "count": len(areas),
        "each": areas,
        "mean_curve": np.mean(list(curves.values()), axis=0).round(5).tolist(),
        "std_curve": np.std(list(curves.values()), axis=0).round(5).tolist(),
    }


def _save_curves(folder: Path, curves: dict[str, Curves]) -> None:
    for name, group in curves.items():
        (folder / name).mkdir(parents=True)
        for key, curve in group.items():
            fsc.save_curve(folder / name / f"{'-'.join(f'{part:06d}' for part in key)}.txt", curve)
