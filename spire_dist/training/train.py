"""`train`: a whole run, from particles to parts, latents and a trained hierarchy; going on where it stopped."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor

from spire_dist.config import RunConfig
from spire_dist.data.blocks import Blocks, choose_workers, local_blocks
from spire_dist.data.loader import BatchSource
from spire_dist.data.resident import resident_images
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import load_checkpoint, save_checkpoint
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import ConfigError, SourceError, Stopped
from spire_dist.files import replacing
from spire_dist.machine import cores
from spire_dist.maps import read_map, write_map
from spire_dist.model.latents import Latents, LatentTable, build_latents
from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import choose_backend
from spire_dist.training.consensus import back_project
from spire_dist.training.metrics import RunLog, say
from spire_dist.training.run import mixture_from_state, open_run, sole_trainer, write_status
from spire_dist.training.stages import find_parts, seed_coarse, seed_hierarchy
from spire_dist.training.trainer import Trainee, build_optimisers, train_stage

SAMPLE_IMAGES = 512
"""Images the seed's amplitude is fitted to."""
PIXELS_PER_THREAD = 2**20
"""Of a batch, for one thread of torch beside the kernels."""
STEPS_PER_STAGE = 10**8
"""Checkpoints are numbered by stage and step in it, in one number that sorts."""


@dataclass(frozen=True)
class _Session:
    """What every step of one run needs."""

    run: Path
    source: BatchSource
    config: RunConfig
    device: torch.device
    log: RunLog
    stop: StopFlag


def train(config: RunConfig, run: Path, blocks: Blocks | None = None) -> None:
    """Train both stages into the directory `run`, or go on with what is there; returns when all is done.

    `blocks` reads the particles in place of this process (`spire_dist.data.blocks`; that of `data.loader = "ray"` is made
    by `cluster.ray_loader`).

    Raises ConfigError, StoreError or RunError for what the user can mend, Stopped (exit code 75) after saving on request.
    """
    if config.data.loader == "ray" and blocks is None:
        raise ConfigError(
            "data.loader = ray: its readers come from cluster.ray_loader; hand them to train(..., blocks=...)"
        )
    store = ParticleStore.open(config.data.store)
    device = _choose_device(config)
    projector = choose_backend(device, wanted=config.projector)
    machine = f"{device}, {use_threads(config, store.box, device)} threads, projector {projector}"
    if not store.has_poses:
        raise ConfigError(
            f"data.store = {store.path}: prepared without poses; prepare it from a file with poses (or --poses)"
        )
    open_run(run, config, store)
    with sole_trainer(run):
        _begin_or_go_on(config, run, store, device, machine, blocks)


def _begin_or_go_on(
    config: RunConfig, run: Path, store: ParticleStore, device: torch.device, machine: str, blocks: Blocks | None
) -> None:
    """The whole run from wherever its checkpoint stands; STATUS.json follows."""
    state = load_checkpoint(run)
    where = (state["stage"], state["step"]) if state else (1, 0)
    if state is not None and (run / "latents.npy").exists():
        say(f"{run}: training is complete (stage 2, step {where[1]})")
        write_status(run, "complete", *where)
        return
    write_status(run, "training", *where)
    say(f"{store.count} particles of {store.box} px at {store.pixel_size:g} Å/px; {machine}")
    try:
        with StopFlag() as stop:
            source = open_source(config, store, device, blocks)
            log = RunLog(run, config.output.log_seconds, device, where, state["elapsed_s"] if state else 0.0)
            volume = consensus_map(run, source, config)
            session = _Session(run, source, config, device, log, stop)
            if state is None or state["stage"] == 1:
                state = _first_stage(session, volume, state)
            _second_stage(session, state)
            log.close()
    except BaseException as error:
        status = json.loads((run / "STATUS.json").read_text())  # the last save
        state_now = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        write_status(run, state_now, status["stage"], status["step"], str(error) or type(error).__name__)
        raise
    write_status(run, "complete", 2, load_checkpoint(run)["step"])  # type: ignore[index]


def open_source(
    config: RunConfig, store: ParticleStore, device: torch.device, blocks: Blocks | None = None
) -> BatchSource:
    """Batches for a device, from memory where all images fit there, else from `blocks` or from the store itself."""
    resident = None if blocks else resident_images(store, config.data.resident, device)
    workers = choose_workers(config.data.workers, device)
    return BatchSource(store, resident, device, blocks or partial(local_blocks, store, workers))


def consensus_map(run: Path, source: BatchSource, config: RunConfig) -> NDArray[np.float32]:
    """The seed map [D, D, D] of a run: the one given, resampled to the store's box, or the back-projected particles."""
    path, box, pixel_size = run / "volumes" / "consensus.mrc", source.store.box, source.store.pixel_size
    if path.exists():
        return read_map(path)[0]
    if config.consensus.map is not None:
        volume = _resample(*read_map(config.consensus.map), box, pixel_size)
        if volume.max() <= -volume.min():
            raise SourceError(f"{config.consensus.map}: density from {volume.min():.3g} to {volume.max():.3g} looks inverted; "
                              "give a map in which protein is positive")  # fmt: skip
    else:
        volume, halves = back_project(source, config.consensus.padding)
        for number, half in enumerate(halves, start=1):
            write_map(path.with_name(f"consensus_half{number}.mrc"), half, pixel_size)
    if not volume.max() > 0:
        raise SourceError(
            f"{config.consensus.map or source.store.path}: the consensus map has no positive density; check the sign"
        )
    write_map(path, volume, pixel_size)
    return volume


def all_latents(latents: Latents, source: BatchSource) -> Tensor:
    """Latents [N, L] of all particles in store order, on the CPU."""
    latents = latents.cpu()
    with torch.no_grad():
        if isinstance(latents, LatentTable):
            return latents.rows.weight.detach().clone()
        batches = source.sequence(SAMPLE_IMAGES)
        return torch.cat([latents(b.rows, b.images, b.ctf, b.rotations, b.shifts_px) for b in batches])


def _first_stage(session: _Session, volume: NDArray[np.float32], state: dict[str, Any] | None) -> dict[str, Any]:
    """Stage 1 to its end; returns its last state, which is also kept in `stage1/`."""
    source, config, kept = session.source, session.config, session.run / "stage1"
    torch.manual_seed(config.seed)
    mixture = seed_coarse(volume, config, source.batch(np.arange(min(SAMPLE_IMAGES, source.store.count))))
    latents = build_latents(
        source.store.count, source.store.box, config.latent, torch.Generator().manual_seed(config.seed)
    )
    trainee = _trainee(session, 1, mixture, latents, state)
    state = _train(session, trainee)
    if not (kept / "latents.npy").exists():
        values, cpu_mixture = all_latents(trainee.latents, source), trainee.mixture.cpu()
        parts = find_parts(cpu_mixture, values, config)  # type: ignore[arg-type]
        _write_results(kept, state, values, torch.from_numpy(parts.anchor_of))
    return state


def _second_stage(session: _Session, state: dict[str, Any]) -> None:
    """Parts, the hierarchy seeded from stage 1, and its training."""
    source, config = session.source, session.config
    torch.manual_seed(config.seed + 2)
    if state["stage"] == 1:
        coarse = mixture_from_state(state, config)
        values = torch.from_numpy(np.load(session.run / "stage1" / "latents.npy"))
        parts = find_parts(coarse, values, config)  # type: ignore[arg-type]
        sizes = np.bincount(parts.anchor_of)
        say(f"parts: {len(np.unique(parts.cluster))} clusters of features, {len(parts.anchors)} anchors with "
            f"{', '.join(map(str, sizes))} Gaussians")  # fmt: skip
        mixture: Mixture = seed_hierarchy(coarse, parts, values, config)  # type: ignore[arg-type]
        latents: Latents = LatentTable(values)
        if config.latent.kind == "encoder":
            latents = _latents_from_state(state, source, config)
        trainee = _trainee(session, 2, mixture, latents, None)
    else:
        latents = _latents_from_state(state, source, config)
        trainee = _trainee(session, 2, mixture_from_state(state, config), latents, state)
    state = _train(session, trainee)
    _write_results(session.run, state, all_latents(trainee.latents, source), state["mixture"]["anchor_of"])


def _trainee(
    session: _Session, stage: int, mixture: Mixture, latents: Latents, state: dict[str, Any] | None
) -> Trainee:
    """A stage ready to train on the session's device, taking over `state` where there is one."""
    mixture, latents = mixture.to(session.device), latents.to(session.device)
    settings = session.config.stage1 if stage == 1 else session.config.stage2
    trainee = Trainee(stage, mixture, latents, build_optimisers(mixture, latents, settings.rates))
    if state is not None:
        trainee.restore(state)
        say(f"going on at stage {stage}, step {trainee.step}")
    return trainee


def _latents_from_state(state: dict[str, Any], source: BatchSource, config: RunConfig) -> Latents:
    if state["latent_kind"] == "table":
        return LatentTable(state["latents"]["rows.weight"])
    latents = build_latents(source.store.count, source.store.box, config.latent, torch.Generator())
    latents.load_state_dict(state["latents"])
    return latents


def _train(session: _Session, trainee: Trainee) -> dict[str, Any]:
    """Train one stage to its end and return its last saved state."""
    run, source, config, log = session.run, session.source, session.config, session.log

    def save() -> None:
        state = trainee.state() | {"elapsed_s": log.elapsed_s, "store_fingerprint": source.store.fingerprint}
        save_checkpoint(run, trainee.stage * STEPS_PER_STAGE + trainee.step, state, config.output.keep)
        write_status(run, "training", trainee.stage, trainee.step)

    stage = config.stage1 if trainee.stage == 1 else config.stage2
    train_stage(trainee, source, config, stage, log, session.stop, save)
    save()
    state = load_checkpoint(run)  # what comes next works on the CPU, wherever this stage was trained
    assert state is not None
    return state


def _write_results(folder: Path, state: dict[str, Any], latents: Tensor, parts: Tensor) -> None:
    """latents.npy last: it marks the stage as ended."""
    folder.mkdir(exist_ok=True)
    if folder.name == "stage1":
        save_checkpoint(
            folder, STEPS_PER_STAGE + state["step"], {k: v for k, v in state.items() if k != "optimisers"}, keep=1
        )
    np.save(folder / "parts.npy", parts.numpy())
    with replacing(folder / "latents.npy") as partial:
        np.save(partial, latents.numpy())


def _resample(volume: NDArray[np.float32], given_a: float, box: int, pixel_size: float) -> NDArray[np.float32]:
    """A map at another pixel size and box, its centre kept at index D // 2."""
    points = (np.arange(box) - box // 2) * (pixel_size / given_a) + volume.shape[0] // 2
    grid = np.meshgrid(points, points, points, indexing="ij")
    return map_coordinates(volume, grid, order=3, mode="constant").astype(np.float32)


def _choose_device(config: RunConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: this machine has no CUDA device; set device to auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def use_threads(config: RunConfig, box: int, device: torch.device) -> int:
    """Set the threads of the kernels and of torch for images of `box` pixels; returns the kernels'.

    Beside the kernels of a CPU torch gets a thread per `PIXELS_PER_THREAD` of a batch. What is left to it are transforms,
    sums and small products: below that size waking a thread takes longer than its share of the work.
    """
    wanted = config.threads or cores()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    pixels = max(config.stage1.batch, config.stage2.batch) * box**2
    torch.set_num_threads(max(1, min(count, pixels // PIXELS_PER_THREAD)) if device.type == "cpu" else wanted)
    numba.set_num_threads(count)
    return count
