"""The tiny set as the benchmark releases its own, and a stand-in for cryoDRGN that knows the truth."""

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
if words[0] == "train_vae":
    run, states = Path(value("-o")), np.asarray(pickle.loads((truth / "gt_latents.pkl").read_bytes())).squeeze()
    first = int(value("--load").split(".")[-2]) + 1 if "--load" in words else 1
    (run / "config.yaml").write_text("{{}}")
    z = np.random.default_rng(0).normal(0, 0.1, (len(states), 4)).astype(np.float32)
    z[np.arange(len(states)), states] += 5
    for epoch in range(first, int(value("-n")) + 1):
        print(f"(INFO) # =====> Epoch: {{epoch}} Average gen loss = 0.7; Finished in 0:00:02.000000", flush=True)
        (run / f"weights.{{epoch}}.pkl").write_bytes(b"")
        (run / f"z.{{epoch}}.pkl").write_bytes(pickle.dumps(z) + pickle.dumps(z))
        while (here / "hang").exists():
            time.sleep(0.05)
else:
    Path(value("-o")).mkdir()
    for number, z in enumerate(np.loadtxt(value("--zfile")).reshape(-1, 4)):
        volume = mrcfile.read(truth / "vols" / "24_org" / f"{{z.argmax():03d}}.mrc")
        with mrcfile.new(Path(value("-o")) / f"vol_{{number:03d}}.mrc") as mrc:
            mrc.set_data(volume)
            mrc.voxel_size = float(value("--Apix"))
'''


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


@pytest.fixture
def stand_in(tiny_truth: Path, tmp_path: Path) -> Path:
    """The Python of an environment whose cryodrgn is the stand-in."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "python").write_text("#!/bin/sh\necho 'cryoDRGN 0.0 (torch 0.0)'\n")
    (folder / "cryodrgn").write_text(STAND_IN.format(python=sys.executable, truth=str(tiny_truth)))
    for name in ("python", "cryodrgn"):
        (folder / name).chmod(0o755)
    return folder / "python"
