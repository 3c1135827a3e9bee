"""Fixtures that more than one folder of tests needs."""

from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from spire_dist.errors import SpireError

WriteParticles = Callable[..., Path]
Refusal = Callable[..., str]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files of many programs (not part of the repository; see its README)."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} with the real data is not here")
    return folder


@pytest.fixture(scope="session")
def write_particles() -> WriteParticles:
    """Writes a small RELION 3.1 data set and returns its STAR file."""

    def write(
        folder: Path,
        *,
        count: int = 150,
        box: int = 16,
        pixel_size: float = 2.0,
        per_stack: int = 60,
        contrast: float = 3.0,
        noise: float = 1.0,
        seed: int = 0,
    ) -> Path:
        """Images of a Gaussian blob in the centre, `contrast` high, in white noise; random poses, usual CTF columns."""
        rng = np.random.default_rng(seed)
        axis = (np.arange(box) - box // 2) * pixel_size
        blob = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (0.15 * box * pixel_size) ** 2))
        images = (contrast * blob + noise * rng.standard_normal((count, box, box)) + 5.0).astype(np.float32)
        (folder / "stacks").mkdir(parents=True)
        names = []
        for first in range(0, count, per_stack):
            name = f"stacks/part{first // per_stack:02d}.mrcs"
            with mrcfile.new(folder / name) as mrc:
                mrc.set_data(images[first : first + per_stack])
            names += [f"{i + 1:06d}@{name}" for i in range(len(images[first : first + per_stack]))]
        optics = pd.DataFrame(
            {
                "rlnOpticsGroup": [1],
                "rlnOpticsGroupName": ["opticsGroup1"],
                "rlnVoltage": [300.0],
                "rlnSphericalAberration": [2.7],
                "rlnAmplitudeContrast": [0.1],
                "rlnImagePixelSize": [pixel_size],
                "rlnImageSize": [box],
            }
        )
        particles = pd.DataFrame(
            {
                "rlnImageName": names,
                "rlnAngleRot": rng.uniform(-180, 180, count),
                "rlnAngleTilt": rng.uniform(0, 180, count),
                "rlnAnglePsi": rng.uniform(-180, 180, count),
                "rlnOriginXAngst": rng.uniform(-3, 3, count),
                "rlnOriginYAngst": rng.uniform(-3, 3, count),
                "rlnDefocusU": rng.uniform(1e4, 2e4, count),
                "rlnDefocusV": rng.uniform(1e4, 2e4, count),
                "rlnDefocusAngle": rng.uniform(-90, 90, count),
                "rlnOpticsGroup": np.ones(count, dtype=int),
            }
        )
        star = folder / "particles.star"
        starfile.write({"optics": optics, "particles": particles}, star)
        return star

    return write


@pytest.fixture
def refusal() -> Refusal:
    """Calls something that must be refused; checks that the message is one line with all `words`, and returns it."""

    def check(kind: type[SpireError], words: list[str], call: Callable[[], object]) -> str:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert message
        for word in words:
            assert word in message
        return message

    return check


@pytest.fixture(scope="session")
def tiny_truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 simulated images, 24 px of 16 Å, of the built-in molecule in four states."""
    from spire_dist.simulation.simulate import simulate

    out = tmp_path_factory.mktemp("tiny") / "truth"
    return simulate(out, states=4, particles=240, box=24, pixel_size=16.0, resolution=30.0, snr=1.0, shift_a=16.0)


@pytest.fixture(scope="session")
def tiny_store(tiny_truth: Path) -> Path:
    """The store of `tiny_truth`, in four shards."""
    from data_prep.convert import prepare

    return prepare(tiny_truth / "particles.star", tiny_truth.parent / "store", sign="+", images_per_shard=64)


@pytest.fixture(scope="session")
def tiny_settings(tiny_store: Path) -> list[str]:
    """`--set` values of a run of a second or two on `tiny_store`: 40 and 24 steps of 32 images."""
    return [
        f"data.store='{tiny_store}'", "device='cpu'", "threads=1", "features=8", "output.log_seconds=0.01",
        "output.volumes=2", "latent.dimension=2", "latent.linear=0", "latent.encoder_width=32", "latent.encoder_box=16",
        "stage1.gaussians=64", "stage1.epochs=5", "stage1.batch=32", "stage1.hidden=16",
        "parts.clusters=2", "parts.anchors=3", "stage2.gaussians=96", "stage2.epochs=3", "stage2.batch=32",
        "stage2.layers=1", "stage2.hidden=16", "stage2.anchor_hidden=16", "stage2.distil_steps=20",
    ]  # fmt: skip
