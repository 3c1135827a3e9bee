"""1,000 projections made by another program, with their poses and the map they are of."""

import pickle

import mrcfile
import numpy as np
import pytest

from data_prep.convert import prepare
from spire_dist.config import load_config
from spire_dist.maps import read_map
from spire_dist.training.run import load_run
from spire_dist.training.train import train

PIXEL_SIZE = 4.0


def correlation(a, b) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_data):
    """A short run on the projections; and the true map."""
    source = shared_data / "particles" / "ml-struct-bio+cryodrgn" / "tests" / "data"
    folder = tmp_path_factory.mktemp("projections")
    with open(source / "toy_rot_trans.pkl", "rb") as file:
        rotations = pickle.load(file)[0]
    # The shifts of that file are not in these images.
    (folder / "poses.pkl").write_bytes(pickle.dumps((rotations, np.zeros((len(rotations), 2), dtype=np.float32))))
    store = prepare(
        source / "toy_projections.star", folder / "store", poses=folder / "poses.pkl", pixel_size=PIXEL_SIZE,
        no_ctf=True, normalise=False, sign="+", dtype="float32",
    )  # fmt: skip
    settings = [
        f"data.store='{store}'", "device='cpu'", "threads=1", "latent.dimension=1", "latent.weight=1", "parts.clusters=1",
        "parts.anchors=1", "stage1.gaussians=400", "stage1.epochs=8", "stage2.gaussians=600", "stage2.epochs=4",
        "stage2.layers=1", "stage2.hidden=16", "stage2.anchor_hidden=16", "stage2.distil_steps=20",
    ]  # fmt: skip
    train(load_config(overrides=settings), folder / "run")
    with mrcfile.open(source / "toymodel_small_nocenter.mrc") as mrc:
        return load_run(folder / "run"), np.array(mrc.data)


@pytest.mark.slow
def test_the_back_projected_map_is_the_map_the_images_are_of(trained):
    run, truth = trained
    volume, pixel_size = read_map(run.consensus)
    assert pixel_size == pytest.approx(PIXEL_SIZE)
    found = correlation(volume, truth)
    print(f"consensus: {found:.4f}")
    assert found > 0.95
    assert correlation(volume[::-1], truth) < 0.9


@pytest.mark.slow
def test_the_trained_model_is_the_map_the_images_are_of(trained):
    run, truth = trained
    found = correlation(run.volume(run.latents.mean(axis=0)), truth)
    print(f"model: {found:.4f}")
    assert found > 0.95
