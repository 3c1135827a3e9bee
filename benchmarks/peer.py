"""cryoDRGN, timed beside our own training: a program of its own environment, run as a separate process.

    python3 -m venv PEER && PEER/bin/pip install cryodrgn==4.3.1 torch==2.13.0

Called by `benchmarks.step`. It reads the simulated set's own files: particles.star and the two pickles in its layout.
"""

import pickle
import subprocess
from pathlib import Path

import numpy as np
import typer

from spire_dist.comparison import programs
from spire_dist.comparison.cryodrgn import epoch_seconds
from spire_dist.comparison.programs import environment
from spire_dist.errors import ConfigError

NETWORK = ("--zdim", "4", "-b", "16", "--enc-dim", "256", "--dec-dim", "256", "--no-amp")
"""Encoder and decoder of three hidden layers of 256, as many latent numbers as ours, float32 as ours."""
EPOCHS = 2
"""The first warms up, the last is timed."""


def versions(python: Path) -> str:
    """What is compared with. Raises typer.BadParameter where the environment of `python` has none."""
    try:
        return programs.versions("cryodrgn", python)
    except ConfigError as error:
        raise typer.BadParameter(f"--peer-python {error}") from error


def images_per_s(python: Path, data: Path, images: int, out: Path, threads: int) -> float:
    """Training speed over `images` of the set `data`, evenly drawn: the last epoch's time by the program's own log.

    That time holds batches, model and optimiser; imports, reading, preprocessing and the latents written after an epoch
    are outside. Raises RuntimeError with the end of the log where the program fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    count = len(pickle.loads((data / "combined_ctfs.pkl").read_bytes()))
    rows = np.linspace(0, count - 1, min(images, count)).round().astype(int)
    (out / "rows.pkl").write_bytes(pickle.dumps(rows))
    command = [
        python.with_name("cryodrgn"), "train_vae", data / "particles.star", "--datadir", data, "--ind", out / "rows.pkl",
        "--poses", data / "combined_poses.pkl", "--ctf", data / "combined_ctfs.pkl", "--uninvert-data",
        *NETWORK, "-n", EPOCHS, "--no-analysis", "--seed", 0, "-o", out / "run",
    ]  # fmt: skip
    finished = subprocess.run(
        [*map(str, command)], env=environment(threads), capture_output=True, text=True, check=False
    )
    log = finished.stdout + finished.stderr
    if finished.returncode:
        raise RuntimeError(f"cryodrgn train_vae failed ({finished.returncode}): {log[-1000:]}")
    return len(rows) / epoch_seconds(log)[EPOCHS]
