"""The tiny set as the benchmark releases its own, and stand-ins for rivals that know the truth."""

import shutil
import sys
from pathlib import Path

import pytest

STAND_IN = '''#!{python}
"""Latents that tell the state and nothing else, and the true map of that state at each; says what it was called with."""
import json, pickle, sys, time
from pathlib import Path
import mrcfile
import numpy as np

truth, here = Path({truth!r}), Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
value = lambda name: words[words.index(name) + 1]
if (here / "fail").exists():
    sys.exit("out of memory")
states = np.asarray(pickle.loads((truth / "gt_latents.pkl").read_bytes())).squeeze()
z = np.random.default_rng(0).normal(0, 0.1, (len(states), 4)).astype(np.float32)
z[np.arange(len(states)), states] += 5

def write_maps(points, folder, name):
    for number, point in enumerate(np.loadtxt(points).reshape(-1, 4)):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with mrcfile.new(path) as mrc:
            mrc.set_data(mrcfile.read(truth / "vols" / "24_org" / f"{{point.argmax():03d}}.mrc"))
            mrc.voxel_size = 1.0
        (path.parent / "params.pkl").touch()
        while (here / "hang").exists():
            time.sleep(0.05)

'''

CRYODRGN = """
if words[0] == "train_vae":
    run = Path(value("-o"))
    first = int(value("--load").split(".")[-2]) + 1 if "--load" in words else 1
    (run / "config.yaml").write_text("{}")
    for epoch in range(first, int(value("-n")) + 1):
        print(f"(INFO) # =====> Epoch: {epoch} Average gen loss = 0.7; Finished in 0:00:02.000000", flush=True)
        (run / f"weights.{epoch}.pkl").write_bytes(b"")
        (run / f"z.{epoch}.pkl").write_bytes(pickle.dumps(z) + pickle.dumps(z))
        while (here / "hang").exists():
            time.sleep(0.05)
else:
    write_maps(value("--zfile"), Path(value("-o")), "vol_{:03d}.mrc")
"""

RECOVAR = """
if words[0] == "pipeline":
    model = Path(value("-o")) / "model"
    model.mkdir(parents=True)
    print("INFO pipeline - standard_recovar_pipeline: time to estimate noise is 1.5")
    (model / "embeddings.pkl").write_bytes(pickle.dumps({"zs": {1: z[:, :1], 4: z, "4_noreg": 0 * z}}))
else:
    write_maps(value("--latent-points"), Path(value("-o")), "vol{:04d}/locres_filtered.mrc")
"""


PYTHON = """#!/bin/sh
# It takes a verb with a bound on memory for the verb, knows its versions, and runs what else it is given.
case "$2" in
    *recovar.commands*) verb="$3"; shift 4; exec "$(dirname "$0")/recovar" "$verb" "$@";;
    *importlib*) echo 0.0 0.0;;
    *) exec {python} "$@";;
esac
"""


@pytest.fixture
def released(tiny_truth: Path, tmp_path: Path) -> Path:
    """`tiny_truth` laid out as CryoBench's sets are: a list of stacks and pickles, no STAR."""
    folder = tmp_path / "released"
    shutil.copytree(tiny_truth, folder)
    for name in ("particles.star", "residues.npz", "simulation.json"):
        (folder / name).unlink()
    images = folder / "images" / "snr1"
    images.mkdir()
    stacks = sorted((folder / "images").glob("*.mrcs"))
    for stack in stacks:
        stack.rename(images / stack.name)
    (images / "sorted_particles.24.txt").write_text("".join(f"{stack.name}\n" for stack in stacks))
    return folder


def environment(name: str, works: str, truth: Path, folder: Path) -> Path:
    """The Python of an environment whose program `name` is a stand-in."""
    folder.mkdir()
    (folder / "python").write_text(PYTHON.format(python=sys.executable))
    (folder / name).write_text(STAND_IN.format(python=sys.executable, truth=str(truth)) + works)
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder / "python"


@pytest.fixture
def stand_in(tiny_truth: Path, tmp_path: Path) -> Path:
    """The Python of an environment whose cryodrgn is the stand-in."""
    return environment("cryodrgn", CRYODRGN, tiny_truth, tmp_path / "peer")


@pytest.fixture
def recovar(tiny_truth: Path, tmp_path: Path) -> Path:
    """The Python of an environment whose recovar is the stand-in."""
    return environment("recovar", RECOVAR, tiny_truth, tmp_path / "recovar")
