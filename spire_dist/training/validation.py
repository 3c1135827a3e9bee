"""How well a model explains particles it was not trained on. Called by sweeps, which compare configurations by it, and by
`validate`, which asks whether latents explain what they were not fitted to.

In a sweep a store is written in a random order, so its last rows are a random sample: training sees a view of the store that
ends before them. For them the model stands still, and only their latents are found. Latents could fit an image's noise too, the
more the more numbers they have; so they are fitted to one half of the image's Fourier coefficients, drawn once, and the loss is
that of the other half.
"""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.config import RunConfig
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.model.image_model import render, squared_residuals
from spire_dist.model.latents import ImageEncoder
from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import project
from spire_dist.progress import progress
from spire_dist.training.saving import State, encoder_from_state, mixture_from_state

MOST_HELD_OUT = 2000
"""Particles that are looked at; more would tell two configurations apart no better than training's own randomness allows."""
FIT_STEPS = 20
FIT_RATE = 0.3
"""Of Adam, in latent units, falling to 0: enough to go 3 units from zero, where it starts."""
BATCH = 64
STARTS = 32
"""Latents drawn from those of the model's own particles: their mean map is the rigid model, the best of them a fit's start."""
HALVES_SEED = 0


def held_out_loss(state: State, config: RunConfig, store: ParticleStore, first: int, device: torch.device) -> float:
    """Mean squared residual per pixel of particles `first` and on, at most `MOST_HELD_OUT`, of the halves not fitted to.

    In units of the noise's variance, as the loss that training logs; without its regularisers.
    """
    mixture = mixture_from_state(state, config).to(device).eval().requires_grad_(False)
    encoder = None if state.latents is not None else encoder_from_state(state, store.box, config).to(device).eval()
    source = BatchSource(store)
    fitted, judged, pixels = _halves(store.box)
    end, total = min(store.count, first + MOST_HELD_OUT), 0.0
    for start in range(first, end, BATCH):
        batch = _moved(source.batch(np.arange(start, min(start + BATCH, end))), device)
        latents = _latents(mixture, encoder, batch, fitted.to(device), config, state.stage)
        with torch.no_grad():
            total += _misfit(mixture, latents, batch, judged.to(device), config, state.stage).double().sum().item()
    return total / ((end - first) * pixels)


def held_out_gain(
    state: State, config: RunConfig, store: ParticleStore, latents: NDArray[np.float32], device: torch.device
) -> NDArray[np.float64]:
    """How much better a latent of its own explains each of a store's first particles than the model's mean map does.

    In nats [n], n at most `MOST_HELD_OUT`: log-likelihood of the coefficients not fitted to, where noise is white with unit
    variance. `latents` [M, L] are those of particles the model knows; the mean map is that over `STARTS` of them, which is the
    rigid map closest to them all. Squares are convex, so latents that say nothing of the judged coefficients lose (Jensen);
    a gain means that what is seen in one half of the coefficients foretells the other. An encoder is not asked: it sees both.
    """
    mixture = mixture_from_state(state, config).to(device).eval().requires_grad_(False)
    source = BatchSource(store)
    fitted, judged = (half.to(device) for half in _halves(store.box)[:2])
    drawn = np.random.default_rng(config.seed).choice(len(latents), min(STARTS, len(latents)), replace=False)
    starts = torch.from_numpy(latents[drawn]).to(device)
    count, gains = min(store.count, MOST_HELD_OUT), []
    for start in progress(range(0, count, BATCH), "held-out particles", unit="batch"):
        batch = _moved(source.batch(np.arange(start, min(start + BATCH, count))), device)
        rigid, nearest = _mean_map(mixture, starts, batch, fitted, judged, config, state.stage)
        z = _fit(mixture, starts[nearest].clone(), batch, fitted, config, state.stage)
        with torch.no_grad():
            flexible = _misfit(mixture, z, batch, judged, config, state.stage)
        gains.append(0.5 * (rigid - flexible).double().cpu().numpy())
    return np.concatenate(gains)


@torch.no_grad()
def _mean_map(
    mixture: Mixture, starts: Tensor, batch: Batch, fitted: Tensor, judged: Tensor, config: RunConfig, stage: int
) -> tuple[Tensor, Tensor]:
    """Of each image [B]: the misfit of the mean map of latents [S, L] on one half of the coefficients, and which of the latents
    is best on the other.
    """
    cut, box = (config.stage1 if stage == 1 else config.stage2).cut, batch.images.shape[-2]
    widths, poses = mixture.gaussians.widths_px(), (batch.rotations, batch.shifts_px)
    total, misfits = torch.zeros(len(batch.rows), box, box, device=batch.images.device), []
    for centres, amplitudes in zip(*mixture.deform(starts), strict=True):
        projections = project(centres, amplitudes, widths, *poses, box, 1.0, cut, config.projector)
        total += projections
        misfits.append(squared_residuals(projections, batch.ctf * fitted, batch.images * fitted))
    mean = total / len(starts)
    return squared_residuals(mean, batch.ctf * judged, batch.images * judged), torch.stack(misfits).argmin(0)


def _latents(
    mixture: Mixture, encoder: ImageEncoder | None, batch: Batch, half: Tensor, config: RunConfig, stage: int
) -> Tensor:
    """Of an encoder what it says; else those that explain one half of the coefficients best, under the prior."""
    if encoder is not None:
        with torch.no_grad():
            return encoder(batch.images, batch.ctf, batch.rotations, batch.shifts_px)
    start = torch.zeros(len(batch.rows), config.latent.dimension, device=batch.images.device)
    return _fit(mixture, start, batch, half, config, stage)


def _fit(mixture: Mixture, latents: Tensor, batch: Batch, half: Tensor, config: RunConfig, stage: int) -> Tensor:
    """Latents [B, L] that explain one half of the coefficients best, under the prior, from a start that they overwrite."""
    latents.requires_grad_(True)
    adam = torch.optim.Adam([latents])
    for step in range(FIT_STEPS):
        adam.param_groups[0]["lr"] = FIT_RATE * 0.5 * (1 + math.cos(math.pi * step / FIT_STEPS))
        misfit = 0.5 * _misfit(mixture, latents, batch, half, config, stage)
        objective = (misfit + config.latent.weight * latents.square().sum(1)).sum()
        adam.zero_grad()
        objective.backward()
        adam.step()
    return latents.detach()


def _misfit(mixture: Mixture, latents: Tensor, batch: Batch, half: Tensor, config: RunConfig, stage: int) -> Tensor:
    """Sum of squared residuals [B] over the coefficients of `half` [D, D // 2 + 1], 0 or 1."""
    cut = (config.stage1 if stage == 1 else config.stage2).cut
    box = batch.images.shape[-2]
    projections = render(mixture, latents, batch.rotations, batch.shifts_px, box, cut, config.projector)
    return squared_residuals(projections, batch.ctf * half, batch.images * half)


def _halves(box: int) -> tuple[Tensor, Tensor, int]:
    """Two halves [D, D // 2 + 1] of the coefficients of a real image, and how many numbers the second one stands for.

    A coefficient and its conjugate are in the same half.
    """
    draw = np.random.default_rng(HALVES_SEED).random((box, box))
    conjugate = np.roll(draw[::-1, ::-1], 1, axis=(0, 1))
    second = np.minimum(draw, conjugate) < np.median(np.minimum(draw, conjugate))
    kept = torch.from_numpy(second[:, : box // 2 + 1])
    return (~kept).float(), kept.float(), int(second.sum())


def _moved(batch: Batch, device: torch.device) -> Batch:
    tensors: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})
