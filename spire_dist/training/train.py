"""`train`: a whole run, from particles to parts, latents and a trained hierarchy; going on where it stopped."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor

from spire_dist.config import RunConfig
from spire_dist.data.blocks import Blocks, choose_workers, local_blocks
from spire_dist.data.loader import BatchSource
from spire_dist.data.order import Order
from spire_dist.data.resident import resident_images
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import ALONE, read_facts
from spire_dist.distributed.collectives import everyones, first_alone
from spire_dist.distributed.heartbeat import Heartbeat
from spire_dist.distributed.holder import sole_trainer
from spire_dist.distributed.mesh import Mesh, init_distributed
from spire_dist.distributed.stopping import StopFlag
from spire_dist.errors import ConfigError, SourceError, Stopped
from spire_dist.files import replacing
from spire_dist.machine import own_cores
from spire_dist.maps import read_map, write_map
from spire_dist.model.latent_table import at_home
from spire_dist.model.latents import ImageEncoder, starting_latents
from spire_dist.model.mixtures import CoarseMixture
from spire_dist.model.pose_corrections import corrected
from spire_dist.physics.projector import choose_backend
from spire_dist.training.consensus import back_project
from spire_dist.training.linear import linear_latents
from spire_dist.training.metrics import RunLog, say
from spire_dist.training.run import open_run, write_poses, write_status
from spire_dist.training.saving import (
    State,
    encoder_from_state,
    load_trainee,
    mixture_from_state,
    read_state,
    save_trainee,
    write_model,
    write_start,
)
from spire_dist.training.stages import find_parts, seed_coarse, seed_second
from spire_dist.training.trainer import train_stage

SAMPLE_IMAGES = 512
"""Images the seed's amplitude is fitted to."""
PIXELS_PER_THREAD = 2**20
"""Of a batch, for one thread of torch beside the kernels."""


@dataclass(frozen=True)
class _Session:
    """What every step of one run needs, on this rank."""

    run: Path
    source: BatchSource
    config: RunConfig
    device: torch.device
    log: RunLog
    beat: Heartbeat
    stop: StopFlag
    mesh: Mesh


def train(config: RunConfig, run: Path, blocks: Blocks | None = None) -> bool:
    """Train both stages into the directory `run`, or go on with what is there; returns when all is done.

    Every rank of a run calls this (`distributed.mesh`); whether this one is the first is returned, which looks after what comes
    next. `blocks` reads the particles in place of this process (`spire_dist.data.blocks`; that of `data.loader = "ray"` is
    made by `cluster.ray_loader`).

    Raises ConfigError, StoreError or RunError for what the user can mend, Stopped (exit code 75) after saving on request,
    RankLostError where other ranks are gone; ElsewhereError where another rank has told the user.
    """
    if config.data.loader == "ray" and blocks is None:
        raise ConfigError(
            "data.loader = ray: its readers come from cluster.ray_loader; hand them to train(..., blocks=...)"
        )
    device, parallel = choose_device(config), config.parallel
    groups = parallel.engine == "deepspeed"  # it wants them even for one process
    with (
        StopFlag() as stop,
        _status(run) as begin_status,
        init_distributed(parallel.gauss, device.type, parallel.timeout_s, groups) as mesh,
        ExitStack() as held,
    ):
        first_alone(mesh, lambda: _prepare(config, run, device, mesh, held))
        store = ParticleStore.open(config.data.store)
        facts = read_facts(run)
        where = (facts["stage"], facts["step"]) if facts else (1, 0)
        if facts is not None and (run / "latents.npy").exists():
            if mesh.rank == 0:
                say(f"{run}: training is complete (stage 2, step {where[1]})")
                write_status(run, "complete", *where)
            return mesh.rank == 0
        if mesh.rank == 0:
            begin_status(where)
        threads = use_threads(config, store.box, device)
        if mesh.rank == 0:
            projector = choose_backend(device, wanted=config.projector)
            say(f"{store.count} particles of {store.box} px at {store.pixel_size:g} Å/px; {device}, "
                f"{_ranks(mesh, config)}{threads} threads, projector {projector}")  # fmt: skip
        source = open_source(config, store, device, blocks)
        elapsed_s = facts["elapsed_s"] if facts else 0.0
        log = RunLog(run, config.output.log_seconds, device, where, elapsed_s, mesh)
        with Heartbeat(run, mesh, where) as beat:
            _train_both(_Session(run, source, config, device, log, beat, stop, mesh), where if facts else None)
        log.close()
        return mesh.rank == 0


def _prepare(config: RunConfig, run: Path, device: torch.device, mesh: Mesh, held: ExitStack) -> None:
    """On the first rank: check what was asked for, make the run directory or check it, and hold it."""
    store = ParticleStore.open(config.data.store)
    choose_backend(device, wanted=config.projector)
    if not store.has_poses:
        raise ConfigError(
            f"data.store = {store.path}: prepared without poses; prepare it from a file with poses (or --poses)"
        )
    place = store.source * (store.source_index.max() + 1) + store.source_index
    if config.poses.refine and len(np.unique(place)) < store.count:
        raise ConfigError(
            f"poses.refine = true: {store.path} holds tilt series, whose images share a particle's pose; set it to false"
        )
    for stage in (config.stage1, config.stage2):
        Order(store.count, store.images_per_chunk, stage.batch, config.seed).portion(0, 0, mesh.world)
        if stage.gaussians < mesh.gauss:
            raise ConfigError(f"parallel.gauss = {mesh.gauss}: more ranks than Gaussians ({stage.gaussians}) to share")
    open_run(run, config, store)
    held.enter_context(sole_trainer(run))


@contextmanager
def _status(run: Path) -> Iterator[Callable[[tuple[int, int]], None]]:
    """STATUS.json says how the run ends, where what this yields was called with the (stage, step) it goes on from."""
    begun = []

    def begin(where: tuple[int, int]) -> None:
        write_status(run, "training", *where)
        begun.append(where)

    try:
        yield begin
    except BaseException as error:
        if not begun:
            raise
        status = json.loads((run / "STATUS.json").read_text())  # the last save
        state_now = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        write_status(run, state_now, status["stage"], status["step"], str(error) or type(error).__name__)
        raise
    if begun:
        write_status(run, "complete", 2, read_facts(run)["step"])  # type: ignore[index]


def _train_both(session: _Session, where: tuple[int, int] | None) -> None:
    """The whole run from wherever its checkpoint stands. A stage begins with a checkpoint that the first rank writes alone."""
    run, source, config, mesh = session.run, session.source, session.config, session.mesh
    volume = consensus_map(run, source, config, mesh)
    if where is None:
        start = table_start(source, config, mesh)
        first_alone(mesh, lambda: _begin_first_stage(session, volume, start))
    if where is None or where[0] == 1:
        _train(session)
        latents = all_latents(run, source, config, mesh)
        first_alone(mesh, lambda: _begin_second_stage(session, latents))
    _train(session)
    latents = all_latents(run, source, config, mesh)
    first_alone(mesh, lambda: _end(session, latents))


def open_source(
    config: RunConfig, store: ParticleStore, device: torch.device, blocks: Blocks | None = None
) -> BatchSource:
    """Batches for a device, from memory where all images fit there, else from `blocks` or from the store itself."""
    resident = None if blocks else resident_images(store, config.data.resident, device)
    workers = choose_workers(config.data.workers, device)
    return BatchSource(store, resident, device, blocks or partial(local_blocks, store, workers))


def consensus_map(run: Path, source: BatchSource, config: RunConfig, mesh: Mesh = ALONE) -> NDArray[np.float32] | None:
    """The seed map [D, D, D] of a run: the one given, resampled to the store's box, or the back-projected particles.

    All ranks project; the first one has the map, the others None.
    """
    path, box, pixel_size = run / "volumes" / "consensus.mrc", source.store.box, source.store.pixel_size
    if everyones(path.exists(), mesh.world_group)[0]:
        return read_map(path)[0]
    found = back_project(source, config.consensus.padding, mesh) if config.consensus.map is None else None
    return first_alone(mesh, lambda: _write_consensus(path, found, config, box, pixel_size))


def _write_consensus(
    path: Path,
    found: tuple[NDArray[np.float32], list[NDArray[np.float32]]] | None,
    config: RunConfig,
    box: int,
    pixel_size: float,
) -> NDArray[np.float32]:
    if found is None:
        assert config.consensus.map is not None
        volume = _resample(*read_map(config.consensus.map), box, pixel_size)
        if volume.max() <= -volume.min():
            raise SourceError(f"{config.consensus.map}: density from {volume.min():.3g} to {volume.max():.3g} looks inverted; "
                              "give a map in which protein is positive")  # fmt: skip
    else:
        volume, halves = found
        for number, half in enumerate(halves, start=1):
            write_map(path.with_name(f"consensus_half{number}.mrc"), half, pixel_size)
    if not volume.max() > 0:
        raise SourceError(
            f"{config.consensus.map or config.data.store}: the consensus map has no positive density; check the sign"
        )
    write_map(path, volume, pixel_size)
    return volume


@torch.no_grad()
def all_latents(run: Path, source: BatchSource, config: RunConfig, mesh: Mesh) -> Tensor:
    """Latents [N, L] of all particles in store order, by the newest checkpoint; an encoder's are made by all ranks.

    Of use on the first rank only: of a table the others get none.
    """
    facts = read_facts(run)
    assert facts is not None
    if facts["latent_steps"] is not None and mesh.rank != 0:
        return torch.empty(0, config.latent.dimension)
    state = _state(run)
    if state.latents is not None:
        return state.latents[:, 0].clone()
    encoder, count = encoder_from_state(state, source.store.box, config), source.store.count
    run_length = -(-count // mesh.world)
    own = np.arange(count)[mesh.rank * run_length : (mesh.rank + 1) * run_length]
    pieces = [np.empty((0, config.latent.dimension), np.float32)]
    for start in range(0, len(own), SAMPLE_IMAGES):
        batch = source.batch(own[start : start + SAMPLE_IMAGES])
        pieces.append(encoder(batch.images, batch.ctf, batch.rotations, batch.shifts_px).numpy())
    return torch.from_numpy(np.concatenate(everyones(np.concatenate(pieces), mesh.world_group)))


def _state(run: Path) -> State:
    """The newest checkpoint, whole."""
    state = read_state(run)
    assert state is not None
    return state


def table_start(source: BatchSource, config: RunConfig, mesh: Mesh = ALONE) -> Tensor | None:
    """Latents [N, L] that a table starts with: random, or of a linear model, with random ones behind its few. All ranks call
    this together. None where an encoder makes latents.
    """
    if config.latent.kind != "table":
        return None
    latents = starting_latents(source.store.count, config.latent.dimension, config.seed)
    if config.latent.linear > 0:
        found = torch.from_numpy(linear_latents(source, config.latent.dimension, config.seed, mesh))
        latents[:, : found.shape[1]] = found
    return latents


def _begin_first_stage(session: _Session, volume: NDArray[np.float32] | None, start: Tensor | None) -> None:
    """The coarse model, seeded from the map."""
    source, config = session.source, session.config
    assert volume is not None
    torch.manual_seed(config.seed)
    mixture = seed_coarse(volume, config, source.batch(np.arange(min(SAMPLE_IMAGES, source.store.count))))
    latents = ImageEncoder(source.store.box, config.latent) if start is None else at_home(start)
    write_start(session.run, 1, mixture, latents, source, config, session.log.elapsed_s)


def _begin_second_stage(session: _Session, latents: Tensor) -> None:
    """Stage 1's results, kept in `stage1/`; its parts; and the hierarchy seeded from them."""
    run, source, config, state = session.run, session.source, session.config, _state(session.run)
    torch.manual_seed(config.seed + 2)
    coarse = mixture_from_state(state, config)
    assert isinstance(coarse, CoarseMixture)
    parts, study = find_parts(coarse, latents, config)
    if not (run / "stage1" / "latents.npy").exists():
        (run / "stage1").mkdir(exist_ok=True)
        with replacing(run / "stage1" / "parts.json") as partial:
            partial.write_text(json.dumps(asdict(study), indent=1) + "\n")
        _write_results(run / "stage1", state, latents, config, torch.from_numpy(parts.anchor_of))
    sizes = np.bincount(parts.anchor_of)
    found = ", ".join(f"{value:.2f}" for value in study.stability)
    say(f"parts: {study.chosen} clusters of features (number by {study.by}, stability {found}), "
        f"{len(parts.anchors)} anchors with {', '.join(map(str, sizes))} Gaussians")  # fmt: skip
    mixture = seed_second(coarse, parts, latents, config, source.store.box)
    encoded = config.latent.kind == "encoder"
    start = encoder_from_state(state, source.store.box, config) if encoded else at_home(latents)
    write_start(run, 2, mixture, start, source, config, session.log.elapsed_s)


def _end(session: _Session, latents: Tensor) -> None:
    """The run's results; poses first, for latents mark the end."""
    run, state = session.run, _state(session.run)
    if state.poses is not None:
        _write_poses(run, state.poses[:, 0], session.source.store, session.config)
    _write_results(run, state, latents, session.config)


def _write_poses(run: Path, numbers: Tensor, store: ParticleStore, config: RunConfig) -> None:
    """The store's poses corrected by `numbers` [N, 5], and how far that moved them."""
    rotations, shifts_px = (
        torch.tensor(store.rotations).double(),
        torch.tensor(store.shifts).double() / store.pixel_size,
    )
    rotations, shifts_px = corrected(rotations, shifts_px, numbers.double(), config.poses)
    write_poses(run, rotations.numpy(), shifts_px.numpy() * store.pixel_size)
    turned_deg, moved_px = (
        float(rate * own.square().sum(1).mean().sqrt())
        for rate, own in ((config.poses.rate_deg, numbers[:, :3]), (config.poses.rate_px, numbers[:, 3:]))
    )
    say(f"poses: turned by {turned_deg:.2f}° and shifted by {moved_px:.2f} px (root mean square)")


def _train(session: _Session) -> None:
    """Train the stage of the newest checkpoint to its end, and save that."""
    run, source, config, log, mesh = session.run, session.source, session.config, session.log, session.mesh
    trainee = load_trainee(run, source, config, mesh, session.device)
    if trainee.step > 0 and mesh.rank == 0:
        say(f"going on at stage {trainee.stage}, step {trainee.step}")

    def save() -> None:
        save_trainee(run, trainee, source, config, log.elapsed_s)
        if mesh.rank == 0:
            write_status(run, "training", trainee.stage, trainee.step)

    train_stage(trainee, source, config, log, session.beat, session.stop, save)
    save()


def _write_results(folder: Path, state: State, latents: Tensor, config: RunConfig, parts: Tensor | None = None) -> None:
    """latents.npy last: it marks the stage as ended. Of stage 1, whose `parts` are found only now, also its model."""
    folder.mkdir(exist_ok=True)
    if parts is None:
        parts = state.model["mixture.anchor_of"]
    else:
        write_model(folder, state, config)
    np.save(folder / "parts.npy", parts.numpy())
    with replacing(folder / "latents.npy") as partial:
        np.save(partial, latents.numpy())


def _ranks(mesh: Mesh, config: RunConfig) -> str:
    if mesh.world == 1:
        return "" if config.parallel.engine == "ddp" else f"DeepSpeed ZeRO-{config.parallel.zero}, "
    engine = "" if config.parallel.engine == "ddp" else f", DeepSpeed ZeRO-{config.parallel.zero}"
    return f"{mesh.world} ranks (replicate {mesh.replicate} × gauss {mesh.gauss}{engine}), each "


def _resample(volume: NDArray[np.float32], given_a: float, box: int, pixel_size: float) -> NDArray[np.float32]:
    """A map at another pixel size and box, its centre kept at index D // 2."""
    points = (np.arange(box) - box // 2) * (pixel_size / given_a) + volume.shape[0] // 2
    grid = np.meshgrid(points, points, points, indexing="ij")
    return map_coordinates(volume, grid, order=3, mode="constant").astype(np.float32)


def choose_device(config: RunConfig) -> torch.device:
    """Where a configuration trains. Raises ConfigError for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: this machine has no CUDA device; set device to auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def use_threads(config: RunConfig, box: int, device: torch.device) -> int:
    """Set the threads of the kernels and of torch for images of `box` pixels; returns the kernels'.

    Beside the kernels of a CPU torch gets a thread per `PIXELS_PER_THREAD` of a batch. What is left to it are transforms,
    sums and small products: below that size waking a thread takes longer than its share of the work.
    """
    wanted = config.threads or own_cores()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    pixels = max(config.stage1.batch, config.stage2.batch) * box**2
    torch.set_num_threads(max(1, min(count, pixels // PIXELS_PER_THREAD)) if device.type == "cpu" else wanted)
    numba.set_num_threads(count)
    return count
