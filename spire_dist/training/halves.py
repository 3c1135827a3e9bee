"""Half-set training: a run's configuration once more on each half of its particles, which share no image and no seed.

    RUN/halves/1  RUN/halves/2     ordinary run directories, that any way of training goes on with
    RUN/halves/N/particles.zarr    the half's particles: a view of the run's store (`data.views.half_view`)

What the halves have in common is what the run was given: poses, CTFs and settings. Each back-projects a consensus of its own,
also where the run was given a map, and finds parts of its own. Called by `results.validate`.
"""

import os
import sys
from pathlib import Path

from spire_dist.config import RunConfig, dump_config, load_config
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import HALVES, Half, half_view
from spire_dist.distributed.launch import launch
from spire_dist.distributed.mesh import launch_variables
from spire_dist.errors import ConfigError, ElsewhereError
from spire_dist.files import write_durably
from spire_dist.training.run import refuse_other_particles
from spire_dist.training.train import train

SEEDS_APART = 1000
"""Between the run and its halves: Gaussians drawn with one seed from two like maps would lie at like places, noise and all."""
RESTARTS = 3


def half_folder(run: Path, half: Half) -> Path:
    """The run directory of a half."""
    return run / "halves" / str(half)


def half_config(run: Path, half: Half) -> RunConfig:
    """The configuration of a half, from the run's."""
    config = load_config(run / "config.toml")
    store = (half_folder(run, half) / "particles.zarr").absolute()
    return config.model_copy(
        update={
            "seed": config.seed + SEEDS_APART * half,
            "data": config.data.model_copy(update={"store": store, "loader": "local"}),
            "consensus": config.consensus.model_copy(update={"map": None}),
            "output": config.output.model_copy(update={"report": False}),
        }
    )


def train_halves(run: Path, processes: int = 1) -> None:
    """Train both halves of a finished run, or go on with them; returns when both are done.

    The directories of both are made first, so that either may also be trained elsewhere (`spire-dist train --run
    RUN/halves/1`, `submit`). Raises what `train` raises, Stopped among it; ElsewhereError where `processes` have told the user.
    """
    if launch_variables(os.environ):
        raise ConfigError("validate: started on several ranks; start it alone with --processes, or first train "
                          f"{half_folder(run, 1)} and {half_folder(run, 2)} as any run")  # fmt: skip
    store = ParticleStore.open(load_config(run / "config.toml").data.store)
    refuse_other_particles(run, store)
    for half in HALVES:
        config = half_config(run, half)
        half_view(store, config.data.store, half)
        if not (half_folder(run, half) / "config.toml").exists():
            write_durably(half_folder(run, half) / "config.toml", dump_config(config))
    for half in HALVES:
        folder = half_folder(run, half)
        if processes == 1:
            train(half_config(run, half), folder)
            continue
        command = [sys.executable, "-m", "spire_dist.cli", "train", "--run", str(folder)]
        if code := launch(command, processes, RESTARTS):
            raise ElsewhereError(code)
