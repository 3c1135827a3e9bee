"""`benchmark`: several methods on the very same images, one after another, each trained and scored alike.

OUT/METHOD-SEED/   a run directory of ours, or a rival's (`programs`), with score.json: what it took and what it reached
OUT/benchmark.*    .json, .md and .png of all runs in OUT that were scored in this way, written after each (`leaderboard`)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spire_dist.comparison.cryodrgn import load_cryodrgn, train_cryodrgn
from spire_dist.comparison.layout import ParticleFiles
from spire_dist.comparison.leaderboard import STAGE_1, write_leaderboard
from spire_dist.comparison.machine import describe_machine
from spire_dist.comparison.methods import Method, Own, Rival
from spire_dist.comparison.moments import keeping_saves, moments
from spire_dist.comparison.programs import RivalModel, find_program
from spire_dist.comparison.recovar import load_recovar, train_recovar
from spire_dist.config import RunConfig, load_config
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError
from spire_dist.files import write_json
from spire_dist.machine import cores
from spire_dist.results.evaluate import Scorable, score_maps, score_parts
from spire_dist.results.runs import read_json, read_metrics
from spire_dist.results.truth import open_truth
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
    files: ParticleFiles
    """The set's own, for rivals."""
    pythons: Mapping[str, Path]
    """Of environments with rivals, by the name of the program."""
    epochs: int
    """Of cryoDRGN, unless `minutes` says how long it may train."""
    minutes: float | None

    @property
    def asked(self) -> dict[str, Any]:
        """What a score depends on beside the run."""
        return {"truth": str(self.data.resolve()), "conformations": self.conformations, "images": self.images}


def benchmark(setting: Setting, methods: Sequence[Method], seeds: Sequence[int]) -> str:
    """Train and score what is not there yet, every method with the first seed before the second; returns the tables as text.

    The same call goes on where it was stopped. Raises ConfigError, RunError or StoreError, and Stopped (exit code 75) after
    saving on request.
    """
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


def check(setting: Setting, methods: Sequence[Method]) -> None:
    """What can be told before the store is there. Raises ConfigError."""
    if setting.epochs < 1 or (setting.minutes is not None and not setting.minutes > 0):
        raise ConfigError(f"epochs {setting.epochs}, minutes {setting.minutes}; give at least 1, or more than 0")
    if setting.images < 0 or (setting.conformations is not None and setting.conformations < 1):
        raise ConfigError(f"conformations {setting.conformations}, images {setting.images}; give at least 1 and 0")
    for method in methods:
        if isinstance(method, Own):
            method.config(setting.store, setting.preset, setting.settings, seed=0)
        else:
            find_program(method.program, setting.pythons[method.program], threads=1)


def read_scores(setting: Setting) -> list[dict]:
    """Of all runs that are there, what they took and reached, where it was asked for in the same way."""
    found = [json.loads(path.read_text()) for path in sorted(setting.out.glob(f"*/{SCORE}"))]
    return [score for score in found if score["asked"] == setting.asked]


def _own(setting: Setting, method: Own, run: Path, seed: int) -> dict | None:
    """Train one of ours, or go on with it; its score, or None where that is there."""
    config = method.config(setting.store, setting.preset, setting.settings, seed)
    if not (run / "latents.npy").exists():
        _compile(setting, config)
    train(keeping_saves(config), run)
    if read_json(run / SCORE).get("asked") == setting.asked:
        return None
    final = load_run(run)
    result = _score(setting, final)
    if (setting.data / "residues.npz").exists():
        result["parts"] = score_parts(final, setting.data, setting.conformations)
    seconds = {stage: max(r["elapsed_s"] for r in read_metrics(run) if r["stage"] == stage) for stage in (1, 2)}
    points = [*moments(run, config), (STAGE_1, seconds[1], load_run(run, stage=1))]
    return {
        "machine": describe_machine(config.threads),
        "images": final.store.count,
        "settings": config.model_dump(mode="json"),
        "training_s": seconds[2],
        "result": result,
        "earlier": [
            {"at": at, "training_s": when, "result": _score(setting, model, whole=at == STAGE_1)}
            for at, when, model in sorted(points, key=itemgetter(1))
        ],
    }


def _compile(setting: Setting, config: RunConfig) -> None:
    """Two steps of both stages, thrown away: a process compiles its kernels when it first needs them, and no method's time
    should hold that. Any map will do for it.
    """
    store = ParticleStore.open(config.data.store)
    truth = open_truth(setting.data, store.box, store.pixel_size)
    short: dict[str, Any] = {"consensus": config.consensus.model_copy(update={"map": truth.maps[0]})}
    for name in ("stage1", "stage2"):
        stage = getattr(config, name)
        short[name] = stage.model_copy(update={"epochs": 2 * stage.batch / store.count, "warmup_epochs": 0.0})
    short["stage2"] = short["stage2"].model_copy(update={"distil_steps": 2})
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        train(config.model_copy(update=short), Path(folder) / "run")


def _score(setting: Setting, model: Scorable, whole: bool = True) -> dict:
    """Of a point on the way (not `whole`) only the score per conformation."""
    images = setting.images if whole else 0
    result, _ = score_maps(model, setting.data, conformations=setting.conformations, images=images, classes=whole)
    return result


def _rival(setting: Setting, method: Rival, run: Path, seed: int) -> dict | None:
    """The same of a rival."""
    # on as many threads as ours
    threads = load_config(preset=setting.preset, overrides=list(setting.settings)).threads or cores()
    program = find_program(method.program, setting.pythons[method.program], threads)
    store, files = ParticleStore.open(setting.store), setting.files
    settings: dict[str, Any] = {"program": program.version, "options": method.options}
    points: list[tuple[str, float, Callable[[], RivalModel]]]
    if method.program == "cryodrgn":
        seconds = train_cryodrgn(
            program, method, files, store, run, seed=seed, epochs=setting.epochs, minutes=setting.minutes
        )
        last = settings["epochs"] = len(seconds)
        points = [
            (f"epoch {epoch}", sum(seconds[:epoch]), partial(load_cryodrgn, program, run, epoch, store))
            for epoch in sorted({1, last // 4, last // 2, last} - {0})
        ]
    else:
        truth = open_truth(setting.data, store.box, store.pixel_size)
        took = train_recovar(program, method, files, truth, store, run, seed=seed)
        points = [("end", took, partial(load_recovar, program, run, store))]
    known = read_json(run / SCORE)
    if known.get("asked") == setting.asked and known["settings"] == settings:
        return None
    *earlier, final = [
        {"at": at, "training_s": when, "result": _score(setting, load(), whole=at == points[-1][0])}
        for at, when, load in points
    ]
    about = {"machine": describe_machine(threads), "images": store.count, "settings": settings}
    return about | final | {"earlier": earlier}
