"""The training loop, the same for both stages and any number of ranks: batch, latents, images, loss, step; log; save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spire_dist.config import RunConfig
from spire_dist.data.loader import Batch, BatchSource, Prefetcher
from spire_dist.data.order import Order
from spire_dist.distributed.collectives import everyones, sum_over
from spire_dist.distributed.heartbeat import Heartbeat
from spire_dist.distributed.mesh import Mesh
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import ElsewhereError, RunError, Stopped
from spire_dist.model.latent_table import LatentTable
from spire_dist.model.latents import ImageEncoder
from spire_dist.model.mixtures import Mixture
from spire_dist.training.deepspeed_engine import DeepSpeed
from spire_dist.training.engines import DataParallel, Engine
from spire_dist.training.jumps import better_latents, drawn_latents
from spire_dist.training.metrics import RunLog
from spire_dist.training.objective import Objective
from spire_dist.training.schedule import rate_factor


@dataclass
class Trainee:
    """What one stage trains, and how far it is: everything a checkpoint of the stage must hold."""

    stage: int
    mixture: Mixture
    """Of this rank: its share of the Gaussians."""
    table: LatentTable | None
    encoder: ImageEncoder | None
    """One of the two makes latents."""
    engine: Engine
    mesh: Mesh
    step: int = 0
    poses: LatentTable | None = None
    """Corrections of the poses (`model.pose_corrections`), where they are refined."""


def build_trainee(
    stage: int,
    mixture: Mixture,
    latents: LatentTable | ImageEncoder,
    config: RunConfig,
    count: int,
    mesh: Mesh,
    step: int = 0,
    poses: LatentTable | None = None,
) -> Trainee:
    """A stage of a run on `count` particles, with its engine. Raises ConfigError for what the engine cannot do."""
    table = latents if isinstance(latents, LatentTable) else None
    encoder = latents if isinstance(latents, ImageEncoder) else None
    objective = Objective(mixture, encoder, config, stage, count, mesh)
    ours = config.parallel.engine == "ddp"
    engine = DataParallel(objective) if ours else DeepSpeed(objective, config.parallel)
    return Trainee(stage, mixture, table, encoder, engine, mesh, step, poses)


def training_order(source: BatchSource, config: RunConfig, stage: int) -> Order:
    """The order in which a stage sees the particles."""
    return source.order((config.stage1 if stage == 1 else config.stage2).batch, config.seed + stage)


def train_stage(
    trainee: Trainee,
    source: BatchSource,
    config: RunConfig,
    log: RunLog,
    beat: Heartbeat,
    stop: StopFlag,
    save: Callable[[], None],
) -> None:
    """Train to the end of the stage; `save()` is called at intervals and before leaving. Raises Stopped on request."""
    mesh, stage = trainee.mesh, config.stage1 if trainee.stage == 1 else config.stage2
    order = training_order(source, config, trainee.stage)
    per_epoch = order.steps_per_epoch
    total, warmup = round(stage.epochs * per_epoch), round(stage.warmup_epochs * per_epoch)
    held = 0
    if trainee.stage == 1 and trainee.table is not None and config.latent.linear > 0:
        held, warmup = round(config.latent.linear * total), 0
    refine_from, rigid = round(config.poses.start * total), round(config.poses.rigid_epochs * per_epoch)
    data = Prefetcher(source.training(order, trainee.step, mesh.rank, mesh.world))
    saved_at = time.monotonic()
    log.restart_interval()
    try:
        while trainee.step < total:
            beat.where = (trainee.stage, trainee.step)
            if mesh.pulse is not None:
                mesh.pulse.step = trainee.step
            batch = data.next()
            factor = rate_factor(trainee.step, total, stage.final_rate)
            since = trainee.step - refine_from
            visits = since // per_epoch + 1 if since >= 0 else 0
            warm = trainee.step < warmup or (trainee.poses is not None and 0 <= since < rigid)
            own = learn(trainee, batch, config, factor, warm, visits, trainee.step < held)
            trainee.step += 1
            asked = stop.requested is not None
            due = mesh.rank == 0 and (log.due() or trainee.step == total)
            late = mesh.rank == 0 and time.monotonic() - saved_at > config.output.save_seconds
            objective, squared, stopping, logging, saving = agree(own, [asked, due, late], mesh)
            if not math.isfinite(objective):
                raise _not_finite(trainee, batch, source, bool(torch.isfinite(own[0])))
            log.count(batch.total, squared / batch.total, len(batch.rows))
            if logging:
                log.write(trainee.stage, trainee.step, total, trainee.step / per_epoch, data.waited_s)
            if stopping or saving:
                save()
                saved_at = time.monotonic()
            if stopping:
                raise _stopped(trainee, stop)
    finally:
        data.close()


def learn(
    trainee: Trainee, batch: Batch, config: RunConfig, factor: float, warm: bool, visits: int = 1, held: bool = False
) -> Tensor:
    """One step on a rank's batch; returns its (objective, sum of squared residuals per pixel), [2].

    factor  share of the peak step sizes
    visits  which visit of the batch's particles this is for the table of poses, where there is one; 0: none yet
    held    whether a table's latents stay as they are
    """
    stage, mesh = config.stage1 if trainee.stage == 1 else config.stage2, trainee.mesh
    table, poses = trainee.table, trainee.poses if visits else None
    latents, corrections = (_read(own, batch, trainee.step) for own in (table, poses))
    # while poses are corrected first, the model rests at z = 0, and latents are wanted afterwards as they are now
    rests = held or (warm and poses is not None)
    if rests and latents is not None:
        latents = latents.detach()
    tried, seed = None, (config.seed, trainee.stage, trainee.step)
    if latents is not None and stage.tries and not warm and not held:
        tried = drawn_latents(mesh, batch, latents, stage.batch // mesh.world, stage.tries, seed)
    objective, squared, squared_tried = trainee.engine(batch, latents, warm, corrections, tried)
    trainee.engine.descend(objective, factor)
    if table is not None and latents is not None and not rests:
        table.descend(factor * stage.rates.latents)
        if tried is not None:
            table.replace(batch.rows, *better_latents(latents, squared, tried, squared_tried, config.latent.weight))
    if poses is not None:
        poses.descend(factor, visits)
    return torch.stack([objective.detach(), squared.sum() / batch.images.shape[-2] ** 2])


def _read(table: LatentTable | None, batch: Batch, step: int) -> Tensor | None:
    """A table's rows of a batch; all ranks together."""
    if table is None:
        return None
    table.visit(step)
    return table(batch.rows)


def agree(own: Tensor, flags: list[bool], mesh: Mesh) -> list[float]:
    """Sums over ranks of `own` and of the flags, so that all ranks do the same; the one wait for a GPU in a step."""
    if mesh.world == 1:
        return [*own.tolist(), *flags]
    message = torch.cat([own, torch.tensor(flags, dtype=own.dtype).to(own.device, non_blocking=True)])
    sum_over([message], mesh.world_group)
    return message.tolist()


def _stopped(trainee: Trainee, stop: StopFlag) -> Stopped | ElsewhereError:
    asked = everyones(stop.requested.name if stop.requested else None, trainee.mesh.world_group)
    if trainee.mesh.rank != 0:
        return ElsewhereError(Stopped.exit_code)
    name = next(name for name in asked if name is not None)
    return Stopped(
        f"stopped by {name} and saved at step {trainee.step} of stage {trainee.stage}; run the same command to go on"
    )


def _not_finite(trainee: Trainee, batch: Batch, source: BatchSource, good: bool) -> RunError | ElsewhereError:
    """The error, on the first rank, with the particles of those ranks whose loss it was."""
    bad = [] if good else batch.rows[:8].tolist()
    rows = np.array([row for rows in everyones(bad, trainee.mesh.world_group) for row in rows], dtype=np.int64)
    if trainee.mesh.rank != 0:
        return ElsewhereError(RunError.exit_code)
    store = source.store
    number = store.source[rows[0]]
    rows = store.source_index[rows[store.source[rows] == number]] + 1
    return RunError(
        f"stage {trainee.stage}, step {trainee.step}: the loss is not finite; the batch holds rows {rows[:8].tolist()}... of "
        f"{store.sources[number]}, counted from 1; start a new --run with lower stage{trainee.stage}.rates"
    )
