"""A stage in a checkpoint, and back: whatever number of ranks, shares and engine wrote it, any other can go on from it.

Tensors: model/NAME (parameters and buffers), adam/NAME/{exp_avg,exp_avg_sq,step}, and of tables `latents` [N, 3, L] and `poses`
[N, 3, 5]. Those with a row per Gaussian are saved in the order of `sharing.placement`, of which every rank of a gauss group has
a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spire_dist import __version__
from spire_dist.config import RunConfig, dump_config
from spire_dist.data.loader import BatchSource
from spire_dist.distributed.checkpoint import ALONE, Rows, Tensors, load_checkpoint, save_checkpoint
from spire_dist.distributed.collectives import sum_over
from spire_dist.distributed.mesh import Mesh
from spire_dist.errors import RunError
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.latent_table import LatentTable, at_home
from spire_dist.model.latents import ImageEncoder
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture, Mixture
from spire_dist.model.pose_corrections import NUMBERS, POSE_BETAS
from spire_dist.model.sharing import placement
from spire_dist.training.trainer import Trainee, build_trainee, training_order

STEPS_PER_STAGE = 10**8
"""Checkpoints are numbered by stage and step in it, in one number that sorts."""


@dataclass(frozen=True)
class State:
    """A checkpoint in this process: of Gaussians and of a table's rows those of its rank."""

    stage: int
    step: int
    model: dict[str, Tensor]
    """By the names of `training.objective.Objective`: mixture. ..., encoder. ..."""
    memory: dict[str, Tensor]
    """Of the optimiser; empty at the start of a stage."""
    latents: Tensor | None
    """[n, 3, L] of a table."""
    facts: dict[str, Any]
    poses: Tensor | None = None
    """[n, 3, 5] of a table of corrections, where poses are refined."""


def save_trainee(run: Path, trainee: Trainee, source: BatchSource, config: RunConfig, elapsed_s: float) -> None:
    """Save a stage as it is now, all ranks together. Raises RunError, and saves nothing, where a number is not finite."""
    tables = trainee.table, trainee.poses
    for table in tables:
        if table is not None:
            table.come_home()
    model = trainee.engine.parameters()
    _refuse_not_finite(trainee, model)
    model |= {f"mixture.{name}": buffer for name, buffer in trainee.mixture.named_buffers()}
    latents, poses = (table.home if table else None for table in tables)
    steps = trainee.table.steps if trainee.table else None
    facts = _facts(source, config, trainee.stage, trainee.step, steps, elapsed_s)
    memory = trainee.engine.memory()
    _write(run, State(trainee.stage, trainee.step, model, memory, latents, facts, poses), config, trainee.mesh)


def write_start(
    run: Path,
    stage: int,
    mixture: Mixture,
    latents: Tensor | ImageEncoder,
    source: BatchSource,
    config: RunConfig,
    elapsed_s: float,
) -> None:
    """Save a stage's beginning, whole, from one process alone; ranks then load it. `latents` are at_home(...) or an encoder."""
    encoder = latents if isinstance(latents, ImageEncoder) else None
    parts = {"mixture": mixture} | ({"encoder": encoder} if encoder else {})
    model = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    refined = stage == 2 and config.poses.refine
    poses = at_home(torch.zeros(source.store.count, NUMBERS)) if refined else None
    facts = _facts(source, config, stage, 0, None if encoder else 0, elapsed_s)
    state = State(stage, 0, model, {}, latents if isinstance(latents, Tensor) else None, facts, poses)
    _write(run, state, config, ALONE)


def write_model(folder: Path, state: State, config: RunConfig) -> None:
    """Save a whole state without its optimiser's memory, to be looked at later."""
    _write(folder, State(state.stage, state.step, state.model, {}, None, state.facts), config, ALONE)


def read_state(run: Path, mesh: Mesh = ALONE) -> State | None:
    """The newest checkpoint: whole for one process alone, else this rank's part. None where there is none.

    Raises RunError for a damaged one.
    """
    loaded = load_checkpoint(run, mesh)
    if loaded is None:
        return None
    tensors, facts = loaded
    found = {name: part.own if isinstance(part, Rows) else part for name, part in tensors.items()}
    back = torch.from_numpy(np.argsort(_held(facts["gaussians"], mesh), kind="stable"))
    natural = {name: value[back] if _per_gaussian(name, value) else value for name, value in found.items()}
    model, memory = _under("model/", natural), _under("adam/", natural)
    return State(facts["stage"], facts["step"], model, memory, natural.get("latents"), facts, natural.get("poses"))


def load_trainee(run: Path, source: BatchSource, config: RunConfig, mesh: Mesh, device: torch.device) -> Trainee:
    """The stage of the newest checkpoint, ready to train on a device; all ranks together."""
    state = read_state(run, mesh)
    assert state is not None
    mixture = mixture_from_state(state, config).to(device)
    order = training_order(source, config, state.stage)
    latents: LatentTable | ImageEncoder
    if state.latents is None:
        latents = encoder_from_state(state, source.store.box, config).to(device)
    else:
        latents = LatentTable(state.latents, order, mesh, device, state.facts["latent_steps"])
    poses = state.poses
    if poses is not None:
        poses = LatentTable(poses, order, mesh, device, betas=POSE_BETAS)
    trainee = build_trainee(state.stage, mixture, latents, config, source.store.count, mesh, state.step, poses)
    if state.memory:
        trainee.engine.remember(state.memory)
    return trainee


def mixture_from_state(state: State, config: RunConfig) -> Mixture:
    """The model of a checkpoint's stage, with the checkpoint's shapes and values."""
    saved = _under("mixture.", state.model)
    gaussians = Gaussians(
        saved["gaussians.offsets"],
        saved["gaussians.log_widths"].exp(),
        saved["gaussians.features"],
        float(saved["gaussians.unit"]),
        fixed_features=config.feature_kind == "position",
    )
    mixture: Mixture
    if state.stage == 1:
        mixture = CoarseMixture(gaussians, config.latent.dimension, config.stage1)
    elif not config.stage2.hierarchy:
        mixture = CoarseMixture(gaussians, config.latent.dimension, config.stage2, saved["anchor_of"])
    else:
        mixture = HierarchicalMixture(
            gaussians,
            saved["anchor_of"],
            saved["anchor_centres"],
            saved["anchor_features"],
            config.latent.dimension,
            config.stage2,
        )
    mixture.load_state_dict(saved)
    return mixture


def encoder_from_state(state: State, box: int, config: RunConfig) -> ImageEncoder:
    """The encoder of a checkpoint."""
    encoder = ImageEncoder(box, config.latent)
    encoder.load_state_dict(_under("encoder.", state.model))
    return encoder


def _write(run: Path, state: State, config: RunConfig, mesh: Mesh) -> None:
    count = state.facts["gaussians"]
    held = _held(count, mesh)
    order = torch.from_numpy(np.searchsorted(np.sort(held), held))
    named = {f"model/{name}": value for name, value in state.model.items()}
    named |= {f"adam/{name}": value for name, value in state.memory.items()}
    tensors: Tensors = {}
    for name, value in named.items():
        shared = _per_gaussian(name, value)
        tensors[name] = Rows(value.cpu()[order], count, "gauss") if shared else value.cpu()
    for name, rows in (("latents", state.latents), ("poses", state.poses)):
        if rows is not None:
            tensors[name] = Rows(rows, state.facts["particles"], "world")
    save_checkpoint(run, state.stage * STEPS_PER_STAGE + state.step, tensors, state.facts, config.output.keep, mesh)


def _held(count: int, mesh: Mesh) -> np.ndarray:
    """Gaussians of a rank, in the order in which they are saved; `sharing.share` has them sorted."""
    size = -(-count // mesh.gauss)
    return placement(count)[mesh.gauss_rank * size : (mesh.gauss_rank + 1) * size]


def _per_gaussian(name: str, value: Tensor) -> bool:
    return value.ndim > 0 and (".gaussians." in name or name.endswith(".anchor_of"))


def _facts(
    source: BatchSource, config: RunConfig, stage: int, step: int, latent_steps: int | None, elapsed_s: float
) -> dict[str, Any]:
    """What is no tensor; `latent_steps` of a table.

    Training draws no random numbers: the seed, in the configuration, stands for all of them.
    """
    settings, order = config.stage1 if stage == 1 else config.stage2, training_order(source, config, stage)
    return {
        "stage": stage,
        "step": step,
        "latent_steps": latent_steps,
        "gaussians": settings.gaussians,
        "particles": source.store.count,
        "elapsed_s": elapsed_s,
        "store_fingerprint": source.store.fingerprint,
        "order": {"images_per_chunk": order.images_per_chunk, "batch": order.batch, "seed": order.seed},
        "config": dump_config(config),
        "versions": {"spire_dist": __version__} | {name: version(name) for name in ("torch", "numpy")},
    }


def _refuse_not_finite(trainee: Trainee, model: Mapping[str, Tensor]) -> None:
    mesh = trainee.mesh
    bad = [name for name, value in model.items() if not torch.isfinite(value).all()]
    for name, table in (("latents", trainee.table), ("poses", trainee.poses)):
        if table is not None and not torch.isfinite(table.home).all():
            bad.append(name)
    count = torch.tensor([float(len(bad))])
    sum_over([count], mesh.world_group)
    if count > 0:
        names = ", ".join(bad[:3]) or "on another rank"
        raise RunError(
            f"stage {trainee.stage}, step {trainee.step}: parameters that are not finite ({names}), which are not saved; start "
            f"a new --run with lower stage{trainee.stage}.rates"
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
