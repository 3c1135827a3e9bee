"""`benchmark`: several methods on the very same images, one after another, each trained and scored alike.

OUT/METHOD-SEED/   a run directory of ours, or a rival's (`rivals`), with score.json: what it took and what it reached
OUT/benchmark.*    .json, .md and .png of all runs in OUT that were scored in this way, written after each (`leaderboard`)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spire_dist.comparison.leaderboard import write_leaderboard
from spire_dist.comparison.machine import describe_machine
from spire_dist.comparison.methods import Method, Own, Rival
from spire_dist.files import write_json
from spire_dist.results.evaluate import Scorable, score_maps
from spire_dist.results.runs import read_json, read_metrics
from spire_dist.training.metrics import say
from spire_dist.training.run import load_run
from spire_dist.training.train import train

SCORE = "score.json"


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    data: Path
    """The set with known truth."""
    out: Path
    store: Path
    """Its particles as a store."""
    preset: str
    settings: Sequence[str]
    """section.key=value, for all of ours."""
    conformations: int | None
    """How many are scored, evenly spaced; None: all."""
    images: int
    """About how many images the per-image score takes."""

    @property
    def asked(self) -> dict[str, Any]:
        """What a score depends on beside the run."""
        return {"truth": str(self.data.resolve()), "conformations": self.conformations, "images": self.images}


def benchmark(setting: Setting, methods: Sequence[Method], seeds: Sequence[int]) -> str:
    """Train and score what is not there yet, every method with the first seed before the second; returns the tables as text.

    The same call goes on where it was stopped. Raises ConfigError for settings that cannot be used before anything is
    trained, RunError or StoreError, Stopped (exit code 75) after saving on request.
    """
    for method in methods:
        if isinstance(method, Own):
            method.config(setting.store, setting.preset, setting.settings, seeds[0])
    text = ""
    for seed in seeds:
        for method in methods:
            run = setting.out / f"{method.name}-{seed}"
            say(f"{run}: {method.label}, seed {seed}")
            found = _own(setting, method, run, seed) if isinstance(method, Own) else _rival(setting, method, run, seed)
            if found is not None:
                write_json(run / SCORE, {"method": method.name, "seed": seed, "asked": setting.asked} | found)
            text = write_leaderboard(setting.out, setting.data, read_scores(setting))
    return text


def read_scores(setting: Setting) -> list[dict]:
    """Of all runs that are there, what they took and reached, where it was asked for in the same way."""
    found = [json.loads(path.read_text()) for path in sorted(setting.out.glob(f"*/{SCORE}"))]
    return [score for score in found if score["asked"] == setting.asked]


def _own(setting: Setting, method: Own, run: Path, seed: int) -> dict | None:
    """Train one of ours, or go on with it; its score, or None where that is there."""
    config = method.config(setting.store, setting.preset, setting.settings, seed)
    train(config, run)
    if read_json(run / SCORE).get("asked") == setting.asked:
        return None
    coarse, final = load_run(run, stage=1), load_run(run)
    seconds = {stage: max(r["elapsed_s"] for r in read_metrics(run) if r["stage"] == stage) for stage in (1, 2)}
    return {
        "machine": describe_machine(config.threads),
        "images": final.store.count,
        "settings": config.model_dump(mode="json"),
        "training_s": seconds[2],
        "result": _score(setting, final),
        "earlier": [{"at": "stage 1", "training_s": seconds[1], "result": _score(setting, coarse)}],
    }


def _score(setting: Setting, model: Scorable) -> dict:
    result, _ = score_maps(model, setting.data, conformations=setting.conformations, images=setting.images)
    return result


def _rival(setting: Setting, method: Rival, run: Path, seed: int) -> dict | None:
    raise NotImplementedError
