"""Whole runs on the tiny set, shared by the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spire_dist.config import load_config
from spire_dist.training.train import train

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train_tiny(tiny_settings: list[str]) -> Train:
    """Trains a run directory on the tiny set, with settings laid over the usual ones; returns the directory."""

    def run(folder: Path, *settings: str) -> Path:
        train(load_config(overrides=[*tiny_settings, *settings]), folder)
        return folder

    return run


@pytest.fixture(scope="session", params=["table", "encoder", "encoder+table"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train_tiny: Train) -> Path:
    """A whole run of each kind of latent."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run", f"latent.kind='{request.param}'")


@pytest.fixture(scope="session")
def finished_table(tmp_path_factory: pytest.TempPathFactory, train_tiny: Train) -> Path:
    """A whole run with a latent table."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")
