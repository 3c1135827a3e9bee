"""A run directory: what it is made with, how it is continued, and how a finished one is read back.

config.toml  command.txt  environment.json  STATUS.json  metrics.jsonl  tb/  checkpoints/  latest
volumes/consensus*.mrc  latents.npy  parts.npy  poses.npz (where they are refined)
stage1/ (the coarse model as it ended, laid out like the run itself)
halves/1  halves/2 (the runs on two halves of the particles that `validate` makes)
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spire_dist import __version__
from spire_dist.config import RunConfig, dump_config, load_config, with_absolute_paths
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.holder import superseded
from spire_dist.errors import ConfigError, RunError
from spire_dist.files import replacing, write_durably
from spire_dist.machine import cores
from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import render_volume
from spire_dist.training.saving import mixture_from_state, read_state

FREE_TO_CHANGE = ("output", "threads", "device", "projector", "data", "parallel", "job")
"""Settings that may differ when a run is continued; all others decide what is computed. (A store may have moved: its
fingerprint tells whether it is the same.)"""


def open_run(run: Path, config: RunConfig, store: ParticleStore) -> None:
    """Make a run directory, or check that an existing one is of the same configuration and particles.

    A run that has neither map nor checkpoint yet (a mistake in its settings ended it) begins anew.

    Raises ConfigError naming the first setting that differs, RunError where the directory cannot be written.
    """
    config = with_absolute_paths(config)
    try:
        (run / "volumes").mkdir(parents=True, exist_ok=True)
        if (run / "latest").exists() or (run / "volumes" / "consensus.mrc").exists():
            _refuse_other_config(run, config)
            refuse_other_particles(run, store)
        else:
            _write_origin(run, store)
        write_durably(run / "config.toml", dump_config(config))
    except OSError as error:
        raise RunError(
            f"{error.filename or run}: cannot be written ({error.strerror}); choose a --run you may write to"
        ) from error


def _write_origin(run: Path, store: ParticleStore) -> None:
    """The command, and where and on what it was started."""
    packages = ("torch", "numpy", "numba", "zarr")
    environment = {
        "store_fingerprint": store.fingerprint,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"spire_dist": __version__} | {name: version(name) for name in packages},
    }
    (run / "command.txt").write_text(" ".join(sys.argv) + "\n")
    (run / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def refuse_other_particles(run: Path, store: ParticleStore) -> None:
    """Raise RunError where a store does not hold the particles, poses and CTFs that a run was started on."""
    known = json.loads((run / "environment.json").read_text())["store_fingerprint"]
    if known != store.fingerprint:
        raise RunError(f"{run}: was started on particles with fingerprint {known[:12]}, {store.path} has "
                       f"{store.fingerprint[:12]}; train on the original store or choose a new --run")  # fmt: skip


def _refuse_other_config(run: Path, config: RunConfig) -> None:
    old, new = load_config(run / "config.toml").model_dump(), config.model_dump()
    for section, value in new.items():
        if section in FREE_TO_CHANGE or value == old[section]:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{section} = {value}: {run} was started with {old[section]}; use that, or a new --run")
        key = next(key for key in value if value[key] != old[section][key])
        raise ConfigError(
            f"{section}.{key} = {value[key]}: {run} was started with {old[section][key]}; use that, or a new --run"
        )


def write_status(run: Path, state: str, stage: int, step: int, message: str = "") -> None:
    """STATUS.json: `training`, `stopped`, `failed` or `complete`, readable by any tool at any moment."""
    if superseded(run):  # it tells of the run's newer life now
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"state": state, "stage": stage, "step": step, "time": now, "pid": os.getpid(), "message": message}
    write_durably(run / "STATUS.json", json.dumps(record) + "\n")


@dataclass(frozen=True)
class FinishedRun:
    """A trained run, for looking at: everything in Å and numpy. G Gaussians, N particles, latents of L numbers."""

    path: Path
    config: RunConfig
    store: ParticleStore
    mixture: Mixture
    stage: int
    latents: NDArray[np.float32]
    """[N, L], in the store's row order."""
    parts: NDArray[np.int64]
    """[G], the part of every Gaussian (of stage 1: its feature cluster's anchor)."""
    poses: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    """Refined rotations [N, 3, 3] and shifts [N, 2] Å, in the store's row order; None: the store's."""

    @property
    def box(self) -> int:
        """Side of the maps in voxels."""
        return self.store.box

    @property
    def pixel_size(self) -> float:
        """Å per voxel."""
        return self.store.pixel_size

    @property
    def consensus(self) -> Path:
        """The map the run was seeded from."""
        return self.path / "volumes" / "consensus.mrc"

    @property
    def widths(self) -> NDArray[np.float32]:
        """Standard deviations [G] in Å."""
        return (self.mixture.gaussians.widths_px().detach() * self.pixel_size).numpy()

    @torch.no_grad()
    def decode(self, latents: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Latents [B, L] -> centres [B, G, 3] Å from the centre of the box, peak densities [B, G]."""
        centres, amplitudes = self.mixture.deform(torch.from_numpy(np.asarray(latents, dtype=np.float32)))
        return (centres * self.pixel_size).numpy(), amplitudes.numpy()

    def volume(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """The map [D, D, D] at a latent [L]."""
        centres, amplitudes = self.decode(np.asarray(latent)[None])
        points, peaks, widths = (torch.from_numpy(a) for a in (centres[0], amplitudes[0], self.widths))
        return render_volume(points, peaks, widths, self.box, self.pixel_size).numpy()

    def volumes(self, latents: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """The maps at latents [B, L], one after another."""
        return (self.volume(latent) for latent in latents)


def load_run(run: Path, stage: int | None = None) -> FinishedRun:
    """A run whose training has ended (stage 2), or the coarse model it went through (stage=1). Raises RunError."""
    if not (run / "config.toml").exists():
        raise RunError(f"{run}: not a run directory (no config.toml); give the --run of a `spire-dist train`")
    config = load_config(run / "config.toml")
    folder = run / "stage1" if stage == 1 else run
    state = read_state(folder)
    if state is None or not (folder / "latents.npy").exists():
        raise RunError(f"{folder}: training has not ended; run `spire-dist train --run {run}` again to go on")
    mixture = mixture_from_state(state, config).eval()
    latents, parts = np.load(folder / "latents.npy"), np.load(folder / "parts.npy")
    store, poses = ParticleStore.open(config.data.store), read_poses(folder)
    return FinishedRun(run, config, store, mixture, state.stage, latents, parts, poses)


def write_poses(run: Path, rotations: NDArray, shifts_a: NDArray) -> None:
    """poses.npz of refined `rotations` [N, 3, 3] and `shifts_a` [N, 2] Å, in the store's row order, as float32."""
    with replacing(run / "poses.npz") as partial:
        np.savez(partial, rotations=rotations.astype(np.float32), shifts_a=shifts_a.astype(np.float32))


def read_poses(run: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """What `write_poses` wrote; None where the run did not refine poses."""
    path = run / "poses.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return arrays["rotations"], arrays["shifts_a"]
