"""cryoDRGN beside ours (`programs`): trained by whole epochs, timed by its own log.

RUN/weights.N.pkl, z.N.pkl, config.yaml   its own, after every epoch
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spire_dist import numpy_pickle
from spire_dist.comparison.layout import ParticleFiles
from spire_dist.comparison.methods import Rival
from spire_dist.comparison.programs import Program, RivalModel, begin, in_rows, read_log, run_program
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError


def epoch_seconds(log: str) -> dict[int, float]:
    """Seconds of each epoch, from lines such as `# =====> Epoch: 2 Average gen loss = ...; Finished in 0:00:05.655847`."""
    found = re.findall(r"=> Epoch: (\d+) .*Finished in (\d+):(\d+):(\d+(?:\.\d+)?)$", log, flags=re.MULTILINE)
    return {int(epoch): 3600 * int(hours) + 60 * int(minutes) + float(s) for epoch, hours, minutes, s in found}


def train_cryodrgn(
    program: Program,
    method: Rival,
    files: ParticleFiles,
    store: ParticleStore,
    run: Path,
    *,
    seed: int,
    epochs: int,
    minutes: float | None,
) -> list[float]:
    """Train on the input of the store, or go on with what is there; returns the seconds of each epoch.

    With `minutes` as many whole epochs as fit into them by the time of the first, at least one, instead of `epochs`. Raises
    ConfigError or SourceError for what it cannot use, RunError where the program fails, Stopped on request.
    """
    poses, ctf = files.pickles(method.label)
    particles = files.particles.resolve()
    start: list[Any] = [program.command, "train_vae", particles, "--poses", poses.resolve(), "--ctf", ctf.resolve()]
    if files.particles.suffix.lower() == ".star":
        start += ["--datadir", particles.parent]
    if store.attributes["sign"]["applied"] < 0:  # its own default is right for images of bright protein
        start += ["--uninvert-data"]
    start += [*method.options, "--no-analysis", "--seed", seed, "-o", run.resolve()]
    begin(run, {"options": method.options, "seed": seed, "particles": store.fingerprint, "version": program.version})
    if minutes is not None:
        _train_to(program, start, run, 1)
        epochs = max(1, int(60 * minutes / epoch_seconds(read_log(run))[1]))
    _train_to(program, start, run, epochs)
    seconds = epoch_seconds(read_log(run))
    return [seconds[epoch] for epoch in range(1, epochs + 1)]


def load_cryodrgn(program: Program, run: Path, epoch: int, store: ParticleStore) -> RivalModel:
    """The checkpoint after an epoch; maps are decoded by one call of `eval_vol`."""

    def decode(points: Path, maps: Path, count: int) -> list[Path]:
        checkpoint = [run / f"weights.{epoch}.pkl", "-c", run / "config.yaml", "--zfile", points, "-o", maps]
        numbered = ["--Apix", store.pixel_size, "--vol-start-index", 0]
        run_program(program, "eval_vol", [program.command, "eval_vol", *checkpoint, *numbered], run)
        return [maps / f"vol_{number:03d}.mrc" for number in range(count)]

    latents = np.asarray(numpy_pickle.load(run / f"z.{epoch}.pkl"), dtype=np.float32)
    return RivalModel(run, store, in_rows(latents, store, run), decode)


def whole_epochs(run: Path) -> int:
    """The last epoch whose checkpoint is whole; latents are written after the weights."""
    numbers = sorted(int(path.name.split(".")[1]) for path in run.glob("z.*.pkl") if path.name.count(".") == 2)
    for epoch in reversed(numbers):
        try:
            numpy_pickle.load(run / f"z.{epoch}.pkl")
        except SourceError:
            continue
        return epoch
    return 0


def _train_to(program: Program, start: Sequence[Any], run: Path, epochs: int) -> None:
    done = whole_epochs(run)
    if done >= epochs:
        return
    load = ["--load", run.resolve() / f"weights.{done}.pkl"] if done else []
    run_program(program, "train_vae", [*start, "-n", epochs, *load], run, _epochs_told)


def _epochs_told(log: str) -> list[str]:
    return [f"epoch {epoch}  {seconds:.1f} s" for epoch, seconds in epoch_seconds(log).items()]
