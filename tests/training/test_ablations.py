"""Models to compare with: without the hierarchy, and with a fixed encoding of places for features."""

import os
import signal

import numpy as np
import pytest
import torch

from spire_dist.config import load_config
from spire_dist.distributed.checkpoint import ALONE
from spire_dist.errors import Stopped
from spire_dist.model.gaussians import position_features
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture
from spire_dist.training import train as module
from spire_dist.training.run import load_run
from spire_dist.training.saving import read_state
from tests.training.test_resume import assert_same_results, at_step

FLAT, POSITION = "stage2.hierarchy=false", "feature_kind='position'"


@pytest.fixture(scope="module", params=[(FLAT,), (POSITION,), (FLAT, POSITION)], ids=["flat", "position", "both"])
def compared(request, tmp_path_factory, train_tiny):
    """A whole run of each, and its settings."""
    return train_tiny(tmp_path_factory.mktemp("compared") / "run", *request.param), request.param


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(compared, train_tiny, tmp_path, monkeypatch):
    finished, settings = compared
    for step in (20, 30):  # in stage 1, then in stage 2
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped):
                train_tiny(tmp_path / "run", *settings)
    train_tiny(tmp_path / "run", *settings)
    assert_same_results(tmp_path / "run", finished)


def test_the_model_is_what_was_asked_for_and_has_learned(compared, tiny_settings):
    finished, settings = compared
    config = load_config(overrides=[*tiny_settings, *settings])
    run = load_run(finished)
    assert isinstance(run.mixture, CoarseMixture if FLAT in settings else HierarchicalMixture)
    assert np.bincount(np.load(finished / "parts.npy")).sum() == config.stage2.gaussians
    centres, _ = run.mixture.deform(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert float((centres[0] - centres[1]).detach().abs().max()) > 1e-3  # the latent moves something


def test_fixed_features_stay_those_of_where_gaussians_started(train_tiny, tmp_path, monkeypatch):
    seen = []
    original = module.seed_coarse
    monkeypatch.setattr(module, "seed_coarse", lambda *arguments: seen.append(original(*arguments)) or seen[-1])
    run = train_tiny(tmp_path / "run", POSITION, "features=12")
    state = read_state(run / "stage1", ALONE)
    assert state is not None
    start = seen[0].gaussians
    torch.testing.assert_close(state.model["mixture.gaussians.features"], start.features, rtol=0, atol=0)
    assert not torch.equal(state.model["mixture.gaussians.offsets"], start.offsets)
    torch.testing.assert_close(start.features, position_features(start.offsets.detach(), 24, 12))
    hierarchy = load_run(run).mixture
    assert not [name for name, _ in hierarchy.named_parameters() if "features" in name]
