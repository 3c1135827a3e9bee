"""A run of ours as it was on the way: the points of its curve against training time, from checkpoints that it kept."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from spire_dist.config import RunConfig
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import read_facts
from spire_dist.training.run import FinishedRun
from spire_dist.training.saving import mixture_from_state, read_state

SAVE_SECONDS = 15.0
KEPT = 400
POINTS = 3
"""Of each stage, at most."""


def keeping_saves(config: RunConfig) -> RunConfig:
    """The same run, that saves often and keeps what it saved."""
    output = config.output.model_copy(update={"save_seconds": SAVE_SECONDS, "keep": KEPT})
    return config.model_copy(update={"output": output})


def moments(run: Path, config: RunConfig) -> Iterator[tuple[str, float, FinishedRun]]:
    """(name, seconds of training, model) at a few saves within each stage of a finished run, evenly chosen, in their order.

    Neither a stage's beginning nor its end is among them, nor a save of a model whose latents an encoder makes.
    """
    names = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
    with TemporaryDirectory() as folder:
        view = Path(folder)
        (view / "checkpoints").symlink_to((run / "checkpoints").absolute())
        for name in _chosen(view, names):
            (view / "latest").write_text(name)
            state = read_state(view)
            assert state is not None
            if state.latents is None:
                continue
            mixture, store = mixture_from_state(state, config).eval(), ParticleStore.open(config.data.store)
            latents = state.latents[:, 0].numpy()
            parts: NDArray[np.int64] = np.zeros(len(mixture.gaussians.widths_px()), dtype=np.int64)  # not scored
            model = FinishedRun(run, config, store, mixture, state.stage, latents, parts)
            yield f"stage {state.stage}, step {state.step}", state.facts["elapsed_s"], model


def _chosen(view: Path, names: list[str]) -> list[str]:
    """The names of the checkpoints that are taken."""
    of_stage: dict[int, list[str]] = {1: [], 2: []}
    for name in names:
        (view / "latest").write_text(name)
        facts = read_facts(view)
        assert facts is not None
        of_stage[facts["stage"]].append(name)
    taken = []
    for inner in (saves[1:-1] for saves in of_stage.values()):
        # evenly spaced and without the ends of the stage, as those are known
        places = np.linspace(-1, len(inner), min(POINTS, len(inner)) + 2)[1:-1].round().astype(int)
        taken += [inner[place] for place in places]
    return taken
