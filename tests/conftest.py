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
