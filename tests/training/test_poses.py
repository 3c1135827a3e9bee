"""Poses refined in stage 2: wrong ones are put right, and those who do not want it notice nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.poses import in_order, perturb, pose_errors, summary
from data_prep.convert import prepare
from spire_dist.config import load_config
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError
from spire_dist.physics.poses import random_rotations
from spire_dist.results.export import export
from spire_dist.simulation.simulate import simulate
from spire_dist.training.run import load_run
from spire_dist.training.saving import read_state
from spire_dist.training.train import train

RESULTS = ("latents.npy", "parts.npy", "stage1/latents.npy")


def test_refinement_that_never_begins_changes_no_bit_and_no_pose(finished_table, tmp_path, train_tiny):
    run = train_tiny(tmp_path / "run", "poses.refine=true", "poses.start=0.99")  # of 24 steps
    assert [name for name in RESULTS if (run / name).read_bytes() != (finished_table / name).read_bytes()] == []
    one, other = read_state(run), read_state(finished_table)
    assert one is not None
    assert other is not None
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model | other.model)
    refined = load_run(run)
    assert refined.poses is not None
    np.testing.assert_allclose(refined.poses[0], refined.store.rotations, atol=1e-6)
    np.testing.assert_allclose(refined.poses[1], refined.store.shifts, rtol=1e-6)


def test_a_run_that_does_not_refine_has_no_poses_of_its_own(finished_table):
    assert not (finished_table / "poses.npz").exists()
    assert load_run(finished_table).poses is None
    state = read_state(finished_table)
    assert state is not None
    assert state.poses is None


def test_refined_poses_are_what_prep_reads_in_the_particles_written(tiny_truth, tmp_path, train_tiny):
    """With an encoder beside them, which has no table of its own."""
    run = train_tiny(tmp_path / "run", "poses.refine=true", "latent.kind='encoder'")
    refined = load_run(run)
    assert refined.poses is not None
    export(refined, tmp_path / "out", path=None, atoms=False)
    (tmp_path / "out" / "images").symlink_to(tiny_truth / "images")
    again = ParticleStore.open(prepare(tmp_path / "out" / "particles.star", tmp_path / "again", sign="+", workers=1))
    for found, expected, given in zip(in_order(again), in_order(refined.store, refined.poses), in_order(refined.store),
                                      strict=True):  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=2e-6 if found.ndim == 3 else 1e-5)
        assert np.abs(found - given).mean() > 1e-4


def test_tilts_of_one_particle_are_not_refined_one_by_one(tiny_settings, tmp_path, refusal, monkeypatch):
    opened = ParticleStore.open

    def tilts(path: Path) -> ParticleStore:
        store = opened(path)
        object.__setattr__(store, "source_index", store.source_index // 2)
        return store

    monkeypatch.setattr(ParticleStore, "open", tilts)
    refusal(ConfigError, ["poses.refine = true", "tilt series", "false"],
            lambda: train(load_config(overrides=[*tiny_settings, "poses.refine=true"]), tmp_path / "run"))  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_errors_are_told_without_a_turn_and_a_move_of_the_model():
    rng, true = np.random.default_rng(0), (random_rotations(50, seed=0), np.zeros((50, 2)))
    turn, move = random_rotations(1, seed=5)[0], np.array([3.0, -1, 2])
    seen = true[0] @ turn.T, -(true[0] @ turn.T)[:, :2] @ move
    errors = summary(pose_errors(seen, true))
    assert errors["turn_deg_rms"] < 0.1  # float32
    assert errors["shift_rms"] < 1e-5
    assert errors["common_shift"] == pytest.approx(np.linalg.norm(move), rel=1e-5)
    off = seen[0], seen[1] + rng.normal(0, 1 / 2**0.5, (50, 2))
    assert summary(pose_errors(off, true))["shift_rms"] == pytest.approx(1, abs=0.2)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """(Truth in the order of the input, the store) of a rigid body whose poses are off by 2° and 1 px."""
    folder = tmp_path_factory.mktemp("wrong")
    truth = simulate(
        folder / "truth", states=1, particles=400, box=32, pixel_size=12.0, resolution=24.0, snr=5.0, shift_a=12.0
    )
    perturb(truth / "particles.star", truth / "wrong.star", 2.0, 12.0, seed=1)
    stores = [
        ParticleStore.open(prepare(truth / f"{name}.star", folder / name, sign="+", workers=1))
        for name in ("particles", "wrong")
    ]
    return in_order(stores[0]), stores[1]


def test_wrong_poses_are_put_right(wrong, tmp_path):
    true, store = wrong
    settings = [
        f"data.store='{store.path}'", "device='cpu'", "threads=1", "features=8", "output.log_seconds=10",
        "latent.dimension=2", "stage1.gaussians=128", "stage1.epochs=8", "stage1.batch=32", "stage1.hidden=16",
        "parts.clusters=2", "parts.anchors=2", "stage2.gaussians=256", "stage2.epochs=24", "stage2.batch=32",
        "stage2.layers=1", "stage2.hidden=16", "stage2.anchor_hidden=16", "stage2.distil_steps=20", "poses.refine=true",
    ]  # fmt: skip
    train(load_config(overrides=settings), tmp_path / "run")
    before = summary(pose_errors(in_order(store), true))
    after = summary(pose_errors(in_order(store, load_run(tmp_path / "run").poses), true))
    assert before["turn_deg_median"] == pytest.approx(1.73, abs=0.1)  # of three normal numbers of 2° rms in all: 1.78
    assert before["shift_median"] == pytest.approx(0.83, abs=0.05)  # of two: √ln 2
    assert after["turn_deg_median"] < 0.5 * before["turn_deg_median"]
    assert after["shift_median"] < 0.25 * before["shift_median"]
    assert after["turn_deg_rms"] < 0.6 * before["turn_deg_rms"]
    assert after["shift_rms"] < 0.4 * before["shift_rms"]
