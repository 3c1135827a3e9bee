"""`validate`: a run without known truth, judged by two halves of its particles. Called by `spire-dist validate`.

The run's configuration is trained again on each half (`training.halves`). Then, at the conformations of the run's maps along
its path, the halves are compared: their maps (`fsc.map_fsc`'s shells), their parts, their motion; and each half's model with
the other half's particles. docs/validation.md says what the numbers mean and what the halves share.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.data.views import HALVES, half_rows
from spire_dist.files import replacing
from spire_dist.maps import read_map
from spire_dist.results import fsc
from spire_dist.results.halves import CrossFsc, Seen, compare_motion, compare_parts, cross_fsc, match
from spire_dist.results.latent_paths import named_path
from spire_dist.results.plots_of_halves import plot_validation
from spire_dist.results.runs import Floats
from spire_dist.training.halves import half_folder, train_halves
from spire_dist.training.run import FinishedRun, load_run
from spire_dist.training.saving import read_state
from spire_dist.training.train import choose_device
from spire_dist.training.validation import held_out_gain

NAME = "validation"
"""Numbers go to validation.json of the run directory, the picture to validation.png."""
THRESHOLDS = (0.143, 0.5)


def validate(run: Path, processes: int = 1) -> dict:
    """Train the run in directory `run` on both halves of its particles, or go on with that, and compare what comes of it.

    processes  ranks to start on this machine for each half, as `train` has them

    Returns what validation.json holds; `table` prints it. Raises RunError for a run that is not finished, and what
    `train_halves` raises: Stopped (exit code 75) where the same call goes on.
    """
    finished = load_run(run)
    train_halves(run, processes)
    result = compare(finished, [load_run(half_folder(run, half)) for half in HALVES])
    with replacing(run / f"{NAME}.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(run / f"{NAME}.png") as path:
        plot_validation(path, result)
    return result


def compare(run: FinishedRun, halves: list[FinishedRun]) -> dict:
    """The numbers of `validate`, ready for JSON."""
    points = named_path(run.latents, "loop", run.config.output.volumes)
    matched, asked = zip(*(_matched(run, half, number, points) for number, half in enumerate(halves)), strict=True)
    found = cross_fsc(halves, matched)
    seen = Seen.of(run, points)
    theirs = [Seen.of(half, latents) for half, latents in zip(halves, matched, strict=True)]
    frequencies = np.arange(run.box // 2 + 1) / (run.box * run.pixel_size)
    one, two = (fsc.spectrum(read_map(half.consensus)[0], found.mask, "rounded") for half in halves)
    of_each = _of_each(found)
    curves = {name: curve.mean(axis=0) for name, curve in of_each.items()}
    curves |= {"differences": found.pooled_differences, "consensus": fsc.correlate(one, two)}
    return {
        "halves": [
            {"run": str(half.path), "particles": half.store.count, "seed": half.config.seed, "neighbours": near}
            for half, near in zip(halves, asked, strict=True)
        ],
        "box": run.box,
        "pixel_size_a": run.pixel_size,
        "mask_share_of_box": float((found.mask > 0.5).mean()),
        "frequencies": frequencies.tolist(),
        "curves": {name: curve.round(5).tolist() for name, curve in curves.items()},
        "spread": of_each["matched"].std(axis=0).round(5).tolist(),
        "resolutions_a": {name: _resolutions(frequencies, curve) for name, curve in curves.items()},
        "means": {name: round(float(curve[1:].mean()), 4) for name, curve in curves.items()},
        "maps": [
            {
                "map": f"volumes/path_{i:03d}.mrc",
                "latent": points[i].tolist(),
                "latents_of_halves": [latents[i].tolist() for latents in matched],
                "resolutions_a": {name: _resolutions(frequencies, curves[i]) for name, curves in of_each.items()},
                "means": {name: round(float(curves[i, 1:].mean()), 4) for name, curves in of_each.items()},
                "likeness": float(found.likeness[i, i]),
            }
            for i in range(len(points))
        ],
        "likeness": found.likeness.round(4).tolist(),
        "parts": compare_parts(seen, theirs),
        "motion": compare_motion(seen, theirs),
        "held_out": _held_out(halves),
    }


def _matched(run: FinishedRun, half: FinishedRun, number: int, points: Floats) -> tuple[Floats, int]:
    rows = half_rows(run.store, HALVES[number])
    return match(run.latents[rows], half.latents, points)


def _of_each(found: CrossFsc) -> dict[str, NDArray[np.float64]]:
    """Curves [K, S] of the conformations."""
    matched = np.arange(len(found.unmasked))
    return {
        "matched": found.masked[matched, matched],
        "mismatched": _others(found.masked),
        "differences": found.differences,
        "unmasked": found.unmasked,
    }


def _others(masked: NDArray[np.float64]) -> NDArray[np.float64]:
    """[K, S]: each conformation of the first half with all others of the second, on average."""
    count = len(masked)
    matched = np.arange(count)
    return (masked.sum(axis=1) - masked[matched, matched]) / (count - 1)


def _resolutions(frequencies: NDArray, curve: NDArray) -> dict[str, float]:
    return {f"{level:g}": round(fsc.resolution(frequencies, curve, level), 3) for level in THRESHOLDS}


def _held_out(halves: list[FinishedRun]) -> list[dict]:
    """Of each half's model, on the other half's particles: the gain in nats per particle over its mean map."""
    found = []
    for half, other in zip(halves, reversed(halves), strict=True):
        state = read_state(half.path)
        assert state is not None
        store = ParticleStore.open(other.config.data.store)
        gain = held_out_gain(state, half.config, store, half.latents, choose_device(half.config))
        found.append(
            {
                "model": str(half.path),
                "particles": len(gain),
                "gain_nats": float(gain.mean()),
                "standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
                "share_better": float((gain > 0).mean()),
            }
        )
    return found


def table(result: dict) -> str:
    """The comparison as lines for a terminal."""
    one, two = result["halves"]
    lines = [
        f"trained apart: {one['particles']} and {two['particles']} particles; {len(result['maps'])} conformations, matched by "
        f"{one['neighbours']} and {two['neighbours']} particles each",
        f"{'FSC of the two halves, inside a soft mask':50}{'0.143':>8}{'0.5 (Å)':>9}{'mean':>8}",
    ]
    names = {
        "matched": "the same conformation",
        "mismatched": "different conformations: what is rigid",
        "differences": "differences from the mean map: what moves",
        "consensus": "the two consensus maps",
        "unmasked": "the same conformation, without the mask",
    }
    for name, text in names.items():
        row = result["resolutions_a"][name]
        lines.append(f"  {text:48}{row['0.143']:8.2f}{row['0.5']:9.2f}{result['means'][name]:8.3f}")
    lines.append(f"{'map':50}{'0.143':>8}{'0.5 (Å)':>9}{'mean':>8}{'others':>8}{'likeness':>10}")
    for row in result["maps"]:
        level, mean = row["resolutions_a"]["matched"], row["means"]
        lines.append(
            f"  {row['map']:48}{level['0.143']:8.2f}{level['0.5']:9.2f}{mean['matched']:8.3f}{mean['mismatched']:8.3f}"
            f"{row['likeness']:10.2f}"
        )
    parts, motion = result["parts"], result["motion"]
    moving = "not in both" if parts["moving"] is None else f"{parts['moving']:.3f}"
    first, second = parts["moving_share_of_mass"]
    lines.append(
        f"parts, adjusted Rand index: {parts['between_halves']:.3f} between the halves, {parts['with_run'][0]:.3f} and "
        f"{parts['with_run'][1]:.3f} with this run; moving/fixed {moving} ({100 * first:.0f} and {100 * second:.0f} % move)"
    )
    lines.append(f"motion: {_told(motion)}")
    lines += [f"  part {row['part']:3d}: {_told(row)}" for row in motion["parts"]]
    for row in result["held_out"]:
        lines.append(
            f"{row['particles']} particles that {row['model']} has not seen: {row['gain_nats']:+.2f} ± "
            f"{row['standard_error']:.2f} nats each against its mean map; {100 * row['share_better']:.0f} % better"
        )
    return "\n".join(lines)


def _told(row: dict) -> str:
    first, second = row["rms_a"]
    return f"correlation {row['correlation']:.2f}, rms {first:.1f} and {second:.1f} Å, difference {row['difference_a']:.1f} Å"
