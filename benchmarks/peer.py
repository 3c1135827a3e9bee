"""cryoDRGN, timed beside our own training: a program of its own environment, run as a separate process.

    python3 -m venv PEER && PEER/bin/pip install cryodrgn==4.3.1 torch==2.13.0

Called by `benchmarks.step`. It reads the simulated set's own files: particles.star and the two pickles in its layout.
"""

import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import typer

NETWORK = ("--zdim", "4", "-b", "16", "--enc-dim", "256", "--dec-dim", "256", "--no-amp")
"""Encoder and decoder of three hidden layers of 256, as many latent numbers as ours, float32 as ours."""
EPOCHS = 2
"""The first warms up, the last is timed."""


def versions(python: Path) -> str:
    """What is compared with. Raises typer.BadParameter where the environment of `python` has none."""
    code = 'from importlib.metadata import version as v; print(f\'cryoDRGN {v("cryodrgn")} (torch {v("torch")})\')'
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise typer.BadParameter(
            f"--peer-python {python}: no cryoDRGN there; make an environment with it: python3 -m venv PEER && "
            "PEER/bin/pip install cryodrgn==4.3.1 torch==2.13.0, then give --peer-python PEER/bin/python"
        ) from error


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
    # Its own defaults, not ours: neither our modules nor how our threads wait.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_WAIT_POLICY")}
    environment["OMP_NUM_THREADS"] = str(threads)
    finished = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    log = finished.stdout + finished.stderr
    if finished.returncode:
        raise RuntimeError(f"cryodrgn train_vae failed ({finished.returncode}): {log[-1000:]}")
    return len(rows) / epoch_seconds(log)[EPOCHS]


def epoch_seconds(log: str) -> dict[int, float]:
    """Seconds of each epoch, from lines such as `# =====> Epoch: 2 Average gen loss = ...; Finished in 0:00:05.655847`."""
    found = re.findall(r"=> Epoch: (\d+) .*Finished in (\d+):(\d+):(\d+(?:\.\d+)?)$", log, flags=re.MULTILINE)
    return {int(epoch): 3600 * int(hours) + 60 * int(minutes) + float(s) for epoch, hours, minutes, s in found}
