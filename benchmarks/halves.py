"""How well two halves foretell the truth: the FSC of a validated run's halves against that with the true maps.

    python -m benchmarks.igg OUT
    spire-dist validate OUT/run
    python -m benchmarks.halves OUT/run OUT/data

Conformations are those of the truth here; else everything is as `spire-dist validate` has it, its mask included. From the FSC
of two halves that of the map of all particles with the truth is expected to be √(2 FSC / (1 + FSC)) (Rosenthal & Henderson
2003), and that of one half √FSC, if all that is wrong with a map is noise of its half. RUN/halves.json holds every number
printed.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.stats import rankdata

from spire_dist.data.views import HALVES, half_rows
from spire_dist.results import fsc
from spire_dist.results.evaluate import nearest_to_means
from spire_dist.results.halves import cross_fsc, match
from spire_dist.results.truth import open_truth, read_labels
from spire_dist.training.halves import half_folder
from spire_dist.training.run import load_run

Curves = NDArray[np.float64]
"""[conformations, shells] of `fsc.map_fsc`."""


def main(
    run: Annotated[Path, typer.Argument(help="Validated run.")],
    truth: Annotated[Path, typer.Argument(help="Its truth, as `simulate` writes it.")],
) -> None:
    """Compare; print and write what came of it."""
    halves, own, one, rigid = curves(run, truth)
    expected = np.sqrt(2 * halves.clip(0) / (1 + halves.clip(0)))
    rows = {
        "two halves": halves,
        "expected of the run with the truth": expected,
        "the run with the truth": own,
        "expected of a half with the truth": np.sqrt(halves.clip(0)),
        "the halves with the truth": one,
        "average of the true maps with the truth": rigid,
    }
    means = {name: found[:, 1:].mean(axis=1) for name, found in rows.items()}
    print(f"{'mean FSC over all shells, inside the mask':44}{'mean':>8}{'lowest':>8}{'highest':>8}")
    for name, values in means.items():
        print(f"{name:44}{values.mean():8.4f}{values.min():8.4f}{values.max():8.4f}")
    ranks = [rankdata(means[name]) for name in ("two halves", "the run with the truth")]
    rank = float(np.corrcoef(ranks)[0, 1])
    print(f"rank correlation over the {len(own)} conformations, two halves and the run with the truth: {rank:.2f}")
    shells = np.linspace(0, len(own[0]) - 1, 9).round().astype(int)[1:]
    print(f"{'shell':44}{''.join(f'{shell:8d}' for shell in shells)}")
    for name, found in rows.items():
        print(f"{name:44}{''.join(f'{value:8.3f}' for value in found.mean(axis=0)[shells])}")
    result = {name: found.round(5).tolist() for name, found in rows.items()} | {"rank correlation": rank}
    (run / "halves.json").write_text(json.dumps(result, indent=1) + "\n")


def curves(run: Path, truth_folder: Path) -> tuple[Curves, Curves, Curves, Curves]:
    """FSC of the halves with each other, and with the truth that of the run, of the halves (mean), of the mean true map."""
    whole, halves = load_run(run), [load_run(half_folder(run, half)) for half in HALVES]
    truth = open_truth(truth_folder, whole.box, whole.pixel_size)
    labels = read_labels(truth.folder, whole.store)
    states = np.unique(labels)
    points = whole.latents[nearest_to_means(whole.latents, labels, states)]
    rows = [half_rows(whole.store, half) for half in HALVES]
    matched = [match(whole.latents[r], half.latents, points)[0] for r, half in zip(rows, halves, strict=True)]
    found = cross_fsc(halves, matched)
    average = fsc.spectrum(truth.average(np.bincount(labels)), found.mask, "rounded")
    own, one, rigid = [], [], []
    for i, state in enumerate(states):
        true = fsc.spectrum(truth.volume(int(state)), found.mask, "rounded")
        maps = [whole.volume(points[i]), *(half.volume(z[i]) for half, z in zip(halves, matched, strict=True))]
        first, *others = (fsc.correlate(true, fsc.spectrum(volume, found.mask, "rounded")) for volume in maps)
        own.append(first)
        one.append(np.mean(others, axis=0))
        rigid.append(fsc.correlate(true, average))
    same = np.arange(len(states))
    return found.masked[same, same], np.array(own), np.array(one), np.array(rigid)


if __name__ == "__main__":
    typer.run(main)
