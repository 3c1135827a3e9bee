"""The loss of particles that were kept from training: honest, repeatable, and small for a good model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spire_dist.config import load_config
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import training_view
from spire_dist.errors import StoreError
from spire_dist.training.saving import read_state
from spire_dist.training.validation import _halves, held_out_loss

CPU = torch.device("cpu")
KEPT = 200
"""Of the tiny set's 240 particles; a shard holds 64."""


@pytest.fixture(scope="module")
def view(tiny_store, tmp_path_factory) -> ParticleStore:
    return training_view(ParticleStore.open(tiny_store), tmp_path_factory.mktemp("view") / "view.zarr", KEPT)


@pytest.fixture(scope="module")
def run(view, train_tiny, tmp_path_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("on-view") / "run", f"data.store='{view.path}'")


def test_a_view_has_the_first_particles_and_no_copy_of_their_images(view, tiny_store):
    whole = ParticleStore.open(tiny_store)
    assert (view.count, whole.count) == (KEPT, 240)
    assert view.fingerprint != whole.fingerprint
    rows = np.arange(KEPT)
    np.testing.assert_array_equal(view.read(rows), whole.read(rows))
    for name in ("rotations", "shifts", "ctf", "optics_group", "source", "source_index", "stack", "slice"):
        np.testing.assert_array_equal(getattr(view, name), getattr(whole, name)[:KEPT])
    with pytest.raises(IndexError):
        view.read([KEPT])
    own = sum(path.stat().st_size for path in view.path.rglob("*") if path.is_file() and "/images/c/" not in str(path))
    assert own < 0.2 * whole.images.count * whole.box**2 * 2


def test_zarr_reads_a_view_too(view):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(view.path, mode="r")
    assert group["images"].shape == (KEPT, 24, 24)
    np.testing.assert_array_equal(group["images"][150:], view.stored(np.arange(150, KEPT)))


def test_a_view_is_made_once_and_only_of_a_shuffled_store(view, tiny_store, tmp_path, refusal):
    whole, before = ParticleStore.open(tiny_store), (view.path / "manifest.json").stat().st_mtime_ns
    training_view(whole, view.path, KEPT)
    assert (view.path / "manifest.json").stat().st_mtime_ns == before
    refusal(StoreError, ["view.zarr", "another store"], lambda: training_view(whole, view.path, KEPT - 1))
    ordered = replace(whole, attributes=json.loads(json.dumps(whole.attributes)))
    ordered.attributes["options"]["shuffle"] = False
    refusal(StoreError, ["no random sample"], lambda: training_view(ordered, tmp_path / "new.zarr", KEPT))
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize("box", [8, 9, 24])
def test_halves_are_halves_and_keep_conjugates_together(box):
    fitted, judged, count = _halves(box)
    assert abs(count - box**2 / 2) <= 2
    np.testing.assert_array_equal(fitted + judged, np.ones((box, box // 2 + 1)))
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((box, box)))
    transform = torch.fft.rfft2(image)
    parts = [torch.fft.irfft2(transform * half, s=(box, box)) for half in (fitted, judged)]
    assert abs((parts[0] * parts[1]).sum()) < 1e-9  # no number is in both
    np.testing.assert_allclose(parts[0] + parts[1], image, atol=1e-12)


def test_training_lowers_the_loss_and_the_same_model_always_has_the_same(run, tiny_store):
    whole, config = ParticleStore.open(tiny_store), load_config(run / "config.toml")
    end = read_state(run)
    assert end is not None
    loss = held_out_loss(end, config, whole, KEPT, CPU)
    assert held_out_loss(end, config, whole, KEPT, CPU) == loss
    blurred = {name: value.clone() for name, value in end.model.items()}
    blurred["mixture.gaussians.log_widths"] += 0.7
    assert held_out_loss(replace(end, model=blurred), config, whole, KEPT, CPU) > 1.02 * loss
    # It is what training logs, of particles that training knows: about as large, and not smaller by much.
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert 0.9 * logged < loss < 1.5 * logged


def test_latents_of_unseen_particles_explain_them(run, tiny_store, monkeypatch):
    whole, config = ParticleStore.open(tiny_store), load_config(run / "config.toml")
    state = read_state(run)
    assert state is not None
    fitted = held_out_loss(state, config, whole, KEPT, CPU)
    monkeypatch.setattr("spire_dist.training.validation.FIT_STEPS", 0)  # they stay at zero: the mean molecule
    assert fitted < held_out_loss(state, config, whole, KEPT, CPU)


def test_more_latents_that_only_fit_noise_are_not_rewarded(tiny_store, tmp_path, train_tiny, monkeypatch):
    """Eight numbers that move Gaussians at random: on the half they were fitted to they help, on the other they do not."""
    settings = ["latent.dimension=8", "stage1.epochs=0.2", "stage2.epochs=0.2", "latent.weight=0"]
    run = train_tiny(tmp_path / "run", *settings)
    whole, config, state = ParticleStore.open(tiny_store), load_config(run / "config.toml"), read_state(run)
    assert state is not None
    generator = torch.Generator().manual_seed(0)
    model = {
        name: 0.3 * torch.randn(value.shape, generator=generator) if "shift" in name else value
        for name, value in state.model.items()
    }
    wild = replace(state, model=model)
    honest = held_out_loss(wild, config, whole, KEPT, CPU)
    fitted, _, count = _halves(whole.box)
    monkeypatch.setattr("spire_dist.training.validation._halves", lambda box: (fitted, fitted, box**2 - count))
    assert held_out_loss(wild, config, whole, KEPT, CPU) < 0.995 * honest


@pytest.mark.parametrize("kind", ["encoder", "encoder+table"])
def test_an_encoder_says_what_the_latents_are(tmp_path, train_tiny, tiny_store, kind):
    run = train_tiny(tmp_path / "run", f"latent.kind='{kind}'")
    whole, config = ParticleStore.open(tiny_store), load_config(run / "config.toml")
    for folder in (run, run / "stage1"):
        state = read_state(folder)
        assert state is not None
        assert 0.5 < held_out_loss(state, config, whole, KEPT, CPU) < 5
