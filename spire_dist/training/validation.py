"""How well a model explains particles it was not trained on: what configurations are compared by. Called by sweeps.

A store is written in a random order, so its last rows are a random sample: training sees a view of the store that ends before
them. For them the model stands still, and only their latents are found. Latents could fit an image's noise too, the more the
more numbers they have; so they are fitted to one half of the image's Fourier coefficients, drawn once, and the loss is that
of the other half.
"""

import hashlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spire_dist.config import RunConfig
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.store import SHARDS, ParticleStore, map_table
from spire_dist.errors import StoreError
from spire_dist.files import replacing
from spire_dist.model.image_model import render, squared_residuals
from spire_dist.model.latents import ImageEncoder
from spire_dist.model.mixtures import Mixture
from spire_dist.schema import MANIFEST_NAME, SCHEMA_VERSION, STACKS_NAME
from spire_dist.training.saving import State, encoder_from_state, mixture_from_state

MOST_HELD_OUT = 2000
"""Particles that are looked at; more would tell two configurations apart no better than training's own randomness allows."""
FIT_STEPS = 20
FIT_RATE = 0.3
"""Of Adam, in latent units, falling to 0: enough to go 3 units from zero, where it starts."""
BATCH = 64
HALVES_SEED = 0


def training_view(store: ParticleStore, folder: Path, count: int) -> ParticleStore:
    """A store of the first `count` particles of another: tables of its own, images by a link. One that is there is used.

    Raises StoreError for a store in the order of its input, whose last particles are no random sample.
    """
    if not store.attributes.get("options", {}).get("shuffle", True):
        raise StoreError(f"{store.path}: its particles are in the order of their file, so that the last ones are no random "
                         "sample; prepare it without --no-shuffle")  # fmt: skip
    fingerprint = hashlib.sha256(f"{store.fingerprint} first {count}".encode()).hexdigest()
    if not (folder / MANIFEST_NAME).exists():
        with replacing(folder, flushed=True) as partial:
            _write_view(store, partial, count, fingerprint)
    view = ParticleStore.open(folder)
    if view.fingerprint != fingerprint:
        raise StoreError(f"{folder}: made of another store than {store.path} as it is now; begin a new folder")
    return view


def _write_view(store: ParticleStore, folder: Path, count: int, fingerprint: str) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / SHARDS).symlink_to((store.path / SHARDS).resolve(), target_is_directory=True)
    group = json.loads((store.path / "zarr.json").read_text())
    group["attributes"]["count"] = count
    files = {"zarr.json": json.dumps(group).encode(), STACKS_NAME: (store.path / STACKS_NAME).read_bytes()}
    for about_file in sorted(store.path.glob("*/zarr.json")):
        name, about = about_file.parent.name, json.loads(about_file.read_text())
        about["shape"][0] = count
        if name != "images":
            about["chunk_grid"]["configuration"]["chunk_shape"][0] = count
            place = "/".join([name, "c", *("0" for _ in about["shape"])])
            files[place] = np.ascontiguousarray(map_table(store.path, name)[:count]).tobytes()
        files[f"{name}/zarr.json"] = json.dumps(about).encode()
    entries = {}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "files": entries}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))


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


def _latents(
    mixture: Mixture, encoder: ImageEncoder | None, batch: Batch, half: Tensor, config: RunConfig, stage: int
) -> Tensor:
    """Of an encoder what it says; else those that explain one half of the coefficients best, under the prior."""
    if encoder is not None:
        with torch.no_grad():
            return encoder(batch.images, batch.ctf, batch.rotations, batch.shifts_px)
    latents = torch.zeros(len(batch.rows), config.latent.dimension, device=batch.images.device, requires_grad=True)
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
