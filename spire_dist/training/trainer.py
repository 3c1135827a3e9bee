"""The training loop, the same for both stages: batch, latents, predicted images, loss, step; log; save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spire_dist.config import RatesConfig, RunConfig, StageConfig
from spire_dist.data.loader import Batch, BatchSource, Prefetcher
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import RunError, Stopped
from spire_dist.model.image_model import render, squared_residuals
from spire_dist.model.latents import Latents, LatentTable
from spire_dist.model.mixtures import Mixture
from spire_dist.training.metrics import RunLog
from spire_dist.training.schedule import rate_factor


@dataclass
class Trainee:
    """What one stage trains, and how far it is: everything a checkpoint of the stage must hold."""

    stage: int
    mixture: Mixture
    latents: Latents
    optimisers: list[torch.optim.Optimizer]
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that continue this stage exactly."""
        return {
            "stage": self.stage,
            "step": self.step,
            "mixture": self.mixture.state_dict(),
            "latents": self.latents.state_dict(),
            "latent_kind": "table" if isinstance(self.latents, LatentTable) else "encoder",
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state of the same shapes."""
        self.mixture.load_state_dict(state["mixture"])
        self.latents.load_state_dict(state["latents"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]


def build_optimisers(mixture: Mixture, latents: Latents, rates: RatesConfig) -> list[torch.optim.Optimizer]:
    """Adam with one step size per kind of parameter; a latent table gets the sparse form, which moves only visited rows.

    (A dense Adam would move the rows of absent particles on, by their old momentum.)
    """
    kinds: dict[str, list[nn.Parameter]] = {
        "centres_px": [],
        "widths": [],
        "amplitudes": [],
        "features": [],
        "networks": [],
    }
    names = {"offsets": "centres_px", "anchor_centres": "centres_px", "log_widths": "widths", "amplitudes": "amplitudes",
             "features": "features", "anchor_features": "features"}  # fmt: skip
    for name, parameter in mixture.named_parameters():
        kinds[names.get(name.split(".")[-1], "networks")].append(parameter)
    table = isinstance(latents, LatentTable)
    if not table:
        kinds["networks"].extend(latents.parameters())
    groups = [{"params": members, "lr": getattr(rates, kind)} for kind, members in kinds.items() if members]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)]
    if table:
        optimisers.append(torch.optim.SparseAdam(list(latents.parameters()), lr=rates.latents, betas=(0.9, 0.99)))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def batch_loss(
    trainee: Trainee, batch: Batch, config: RunConfig, stage: StageConfig, warm: bool, count: int
) -> tuple[Tensor, Tensor]:
    """(objective, mean squared residual per pixel) of one batch.

    Objective, in nats per image: ½ |I - CTF · P|² + λ_z |z|² + λ_f Σ|df|² / N (equation 7; images have unit noise).
    During warm-up every latent is zero, so that the static Gaussians settle first.
    """
    box = batch.images.shape[-2]
    z = trainee.latents(batch.rows, batch.images, batch.ctf, batch.rotations, batch.shifts_px)
    seen = torch.zeros_like(z) if warm else z
    projections = render(trainee.mixture, seen, batch.rotations, batch.shifts_px, box, stage.cut, config.projector)
    squared = squared_residuals(projections, batch.ctf, batch.images)
    prior = config.latent.weight * z.square().sum(1)
    objective = (0.5 * squared + prior).mean() + trainee.mixture.regulariser() / count
    return objective, squared.detach().mean() / box**2


def train_stage(
    trainee: Trainee,
    source: BatchSource,
    config: RunConfig,
    stage: StageConfig,
    log: RunLog,
    stop: StopFlag,
    save: Callable[[], None],
) -> None:
    """Train to the end of the stage; `save()` is called at intervals and before leaving. Raises Stopped on request."""
    count = source.store.count
    order = source.order(stage.batch, config.seed + trainee.stage)
    per_epoch = order.steps_per_epoch
    total, warmup = round(stage.epochs * per_epoch), round(stage.warmup_epochs * per_epoch)
    data = Prefetcher(source.training(order, trainee.step))
    saved_at = time.monotonic()
    log.restart_interval()
    try:
        while trainee.step < total:
            batch = data.next()
            factor = rate_factor(trainee.step, total, stage.final_rate)
            objective, residual = batch_loss(trainee, batch, config, stage, trainee.step < warmup, count)
            for optimiser in trainee.optimisers:
                optimiser.zero_grad()
            objective.backward()
            for optimiser in trainee.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = factor * group["peak"]
                optimiser.step()
            trainee.step += 1
            value, loss = torch.stack([objective.detach(), residual]).tolist()  # the one wait for a GPU in a step
            if not math.isfinite(value):
                raise RunError(_not_finite(trainee, batch, source))
            log.count(len(batch.rows), loss)
            if log.due() or trainee.step == total:
                log.write(trainee.stage, trainee.step, total, trainee.step / per_epoch, data.waited_s)
            if stop.requested or time.monotonic() - saved_at > config.output.save_seconds:
                save()
                saved_at = time.monotonic()
            if stop.requested:
                where = f"step {trainee.step} of stage {trainee.stage}"
                raise Stopped(f"stopped by {stop.requested.name} and saved at {where}; run the same command to go on")
    finally:
        data.close()


def _not_finite(trainee: Trainee, batch: Batch, source: BatchSource) -> str:
    store, rows = source.store, batch.rows.cpu().numpy()
    number = store.source[rows[0]]
    rows = store.source_index[rows[store.source[rows] == number]] + 1
    return (
        f"stage {trainee.stage}, step {trainee.step}: the loss is not finite; the batch holds rows {rows[:8].tolist()}... of "
        f"{store.sources[number]}, counted from 1; start a new --run with lower stage{trainee.stage}.rates"
    )
