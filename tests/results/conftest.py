"""A stand-in for a finished run: a body of Gaussians with an arm that turns with z, and the truth it was drawn from."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spire_dist.maps import write_map
from spire_dist.physics.projector import render_volume

STATES, IMAGES, BOX, PIXEL_SIZE = 6, 20, 32, 6.0


@dataclass
class StandIn:
    """The attributes of a finished run; latents lie on a ring in the first two of three dimensions."""

    directory: Path
    store: SimpleNamespace
    latents: NDArray
    consensus: Path
    stage: int
    base_centres: NDArray
    base_amplitudes: NDArray
    widths: NDArray
    parts: NDArray
    box: int
    pixel_size: float
    poses: tuple[NDArray, NDArray] | None = None

    def decode(self, z):
        turn = np.arctan2(z[:, 1], z[:, 0])
        centres = np.repeat(self.base_centres[None], len(z), axis=0)
        arm = self.parts == 1
        cos, sin, zero, one = np.cos(turn), np.sin(turn), np.zeros_like(turn), np.ones_like(turn)
        matrix = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], axis=1).reshape(-1, 3, 3)
        centres[:, arm] = np.einsum("bij,gj->bgi", matrix, self.base_centres[arm])
        return centres.astype(np.float32), np.repeat(self.base_amplitudes[None], len(z), axis=0)

    def volume(self, z):
        centres, amplitudes = self.decode(z[None])
        arrays = [torch.from_numpy(a) for a in (centres[0], amplitudes[0], self.widths)]
        return render_volume(*arrays, self.box, self.pixel_size).numpy()

    def volumes(self, latents):
        return (self.volume(z) for z in latents)


def make_standin(folder: Path, noise: float = 0.05) -> StandIn:
    """A run directory `folder`/run and its truth in `folder`/truth; store rows are shuffled against the input's."""
    rng = np.random.default_rng(0)
    body = rng.normal(0, 14, (60, 3)) * [1, 1, 1.6]
    arm = np.array([45, 0, 10]) + rng.normal(0, 7, (30, 3))
    count = STATES * IMAGES
    source_index = rng.permutation(count)
    label = np.repeat(np.arange(STATES), IMAGES)[source_index]
    turn = 2 * np.pi * label / STATES
    latents = np.stack([np.cos(turn), np.sin(turn), np.zeros(count)], axis=1) + rng.normal(0, noise, (count, 3))
    run_folder, truth = folder / "run", folder / "truth"
    rotations = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0].astype(np.float32)
    ctf = np.tile(np.float32([15000, 15000, 0, 300, 2.7, 0.1, 0, 0, 1]), (count, 1))
    ctf[:, :2] += rng.uniform(-5000, 5000, (count, 1)).astype(np.float32)
    star = truth / "particles.star"
    store = SimpleNamespace(
        path=folder / "particles.zarr", box=BOX, pixel_size=PIXEL_SIZE, count=count, rotations=rotations,
        shifts=rng.uniform(-20, 20, (count, 2)).astype(np.float32), ctf=ctf, source_index=source_index, label=None,
        source=np.zeros(count, dtype=np.int32), sources=[star],
        attributes={},
        read=lambda rows: np.random.default_rng(1).normal(size=(len(rows), BOX, BOX)).astype(np.float32),
    )  # fmt: skip
    run = StandIn(
        directory=run_folder, store=store, latents=latents.astype(np.float32), stage=2,
        consensus=run_folder / "volumes" / "consensus.mrc", base_centres=np.concatenate([body, arm]),
        base_amplitudes=rng.uniform(0.5, 1, 90).astype(np.float32), widths=np.full(90, 7.0, dtype=np.float32),
        parts=np.repeat([0, 1], [60, 30]), box=BOX, pixel_size=PIXEL_SIZE,
    )  # fmt: skip
    write_truth(truth, run, np.repeat(np.arange(STATES), IMAGES))
    store.attributes["inputs"] = [as_recorded(star)]
    ring = 2 * np.pi * np.arange(STATES) / STATES
    average = np.mean([run.volume(np.array([np.cos(a), np.sin(a), 0])) for a in ring], axis=0)
    write_map(run.consensus, average, PIXEL_SIZE)
    for half in (1, 2):
        write_map(
            run.consensus.with_name(f"consensus_half{half}.mrc"),
            average + rng.normal(0, 0.1, average.shape),
            PIXEL_SIZE,
        )
    write_run_files(run_folder)
    return run


def as_recorded(path: Path) -> dict[str, str | int]:
    """A particle file, as a store's attribute `inputs` lists it."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"role": "particles", "path": str(path), "bytes": len(content), "sha256": digest}


def write_truth(truth: Path, run: StandIn, labels: NDArray) -> None:
    ring = 2 * np.pi * np.arange(STATES) / STATES
    z = np.stack([np.cos(ring), np.sin(ring), np.zeros(STATES)], axis=1)
    volumes = [run.volume(point) for point in z]
    for state, volume in enumerate(volumes):
        write_map(truth / "vols" / f"{BOX}_org" / f"{state:03d}.mrc", volume, PIXEL_SIZE)
    average = np.mean(volumes, axis=0)
    write_map(truth / "init_mask" / "mask.mrc", (average > 0.02 * average.max()).astype(np.float32), PIXEL_SIZE)
    (truth / "gt_latents.pkl").write_bytes(pickle.dumps(labels))
    np.savez(
        truth / "residues.npz", coordinates=run.decode(z)[0], present=np.ones((STATES, 90), dtype=bool),
        group=run.parts, group_names=["fixed", "arm"],
    )  # fmt: skip
    rows = "\n".join(f"{i + 1:06d}@images/000.mrcs 1 {i / 7:.9f} 0.10" for i in range(len(labels)))
    (truth / "particles.star").write_text(
        "# version 30001\n\ndata_general\n\n_rlnNote 'two words'\n\n"
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n"
        "1 300.000000\n\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnOpticsGroup #2\n"
        "_rlnAngleRot #3\n_rlnCtfMaxResolution #4\n" + rows + "\n"
    )  # fmt: skip


def write_run_files(folder: Path) -> None:
    lines = []
    for step in range(40):
        stage = 1 if step < 20 else 2
        lines.append({"stage": stage, "step": step * 10, "epoch": step / 4, "loss": 1 + 1 / (step + 1),
                      "images_per_s": 900.0, "wait_share": 0.01, "memory_gib": 1.5,
                      "elapsed_s": 10.0 * step})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text("seed = 0\n\n[stage1]\ngaussians = 90\n")
    (folder / "command.txt").write_text("spire-dist train --config <ring>.toml\n")


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return make_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def recorded() -> Callable[[Path], dict[str, str | int]]:
    return as_recorded
