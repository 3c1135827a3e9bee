"""Back-projection of images whose map is known, and the map a run starts from."""

from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from spire_dist.config import load_config
from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.maps import read_map, write_map
from spire_dist.physics.ctf import contrast_transfer, frequency_grid
from spire_dist.physics.poses import random_rotations
from spire_dist.physics.projector import project, render_volume
from spire_dist.training.consensus import back_project
from spire_dist.training.train import consensus_map

COUNT, PIXEL_SIZE = 1500, 5.0


def known_source(box: int, noise: float = 0.0, images: int = COUNT) -> tuple[BatchSource, np.ndarray]:
    """Images (CTF, shifts, perhaps noise) of 30 Gaussians, and their map; densities are per pixel length."""
    rng = np.random.default_rng(0)
    centres = torch.from_numpy(rng.normal(0, 0.13 * box, (30, 3)).astype(np.float32)) * PIXEL_SIZE
    amplitudes = torch.from_numpy(rng.uniform(0.5, 1.5, 30).astype(np.float32))
    widths = torch.full((30,), 1.5 * PIXEL_SIZE)
    rotations = torch.from_numpy(random_rotations(images, seed=1))
    shifts = rng.uniform(-3, 3, (images, 2)).astype(np.float32) * PIXEL_SIZE
    ctf = np.tile(np.float32([0, 0, 25, 300, 2.7, 0.1, 0, 0, 1]), (images, 1))
    ctf[:, 0] = rng.uniform(8000, 20000, images)
    ctf[:, 1] = ctf[:, 0] + 300
    clean = project(centres, amplitudes, widths, rotations, torch.from_numpy(shifts), box, PIXEL_SIZE) / PIXEL_SIZE
    factors = contrast_transfer(torch.from_numpy(ctf), *frequency_grid(box, PIXEL_SIZE))
    pictures = torch.fft.irfft2(factors * torch.fft.rfft2(clean), s=(box, box)).numpy()
    pictures = pictures + np.float32(noise) * rng.standard_normal(pictures.shape, dtype=np.float32)
    store = SimpleNamespace(
        path="store", count=images, box=box, pixel_size=PIXEL_SIZE, rotations=rotations.numpy(), shifts=shifts, ctf=ctf,
        scale=None, source_index=np.arange(images),
    )  # fmt: skip
    truth = render_volume(centres, amplitudes, widths, box, PIXEL_SIZE).numpy()
    return BatchSource(store, pictures), truth  # type: ignore[arg-type]


def correlation(a, b) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def scale(volume, truth) -> float:
    """Slope of the map against the truth, offsets aside (low frequencies carry little CTF)."""
    truth = truth - truth.mean()
    return float((volume * truth).sum() / (truth**2).sum())


@pytest.mark.parametrize("box", [32, 33])
def test_noise_free_projections_give_the_map_with_its_scale(box):
    source, truth = known_source(box)
    volume, halves = back_project(source)
    assert volume.shape == truth.shape == (box,) * 3
    for found in (volume, *halves):
        assert correlation(found, truth) > 0.98
        assert scale(found, truth) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("box", [24, 25])
def test_the_map_is_not_moved_or_mirrored(box):
    source, truth = known_source(box, images=600)
    volume, _ = back_project(source)
    power = np.fft.fftn(volume) * np.fft.fftn(truth).conj()
    assert np.unravel_index(np.fft.ifftn(power).real.argmax(), truth.shape) == (0, 0, 0)
    for wrong in (truth[::-1], truth[:, ::-1], truth[:, :, ::-1], truth.transpose(2, 1, 0)):
        assert correlation(volume, wrong) < correlation(volume, truth) - 0.1


def test_half_maps_share_the_signal_and_not_the_noise():
    noisy, truth = known_source(24, noise=3.0)
    volume, (first, second) = back_project(noisy)
    errors = [half - scale(half, truth) * truth for half in (first, second)]
    assert abs(correlation(*errors)) < 0.25
    assert correlation(first, truth) > 0.5
    assert correlation(volume, truth) > max(correlation(half, truth) for half in (first, second))


@pytest.mark.parametrize("padding", [1, 3])
def test_other_paddings_give_the_same_map(padding):
    source, truth = known_source(24)
    volume, _ = back_project(source, padding)
    assert correlation(volume, truth) > (0.95 if padding == 1 else 0.98)


def test_a_real_store_gives_the_average_of_its_true_maps(tiny_store, tiny_truth):
    volume, _ = back_project(BatchSource(ParticleStore.open(tiny_store)))
    maps = [read_map(path)[0] for path in sorted((tiny_truth / "vols" / "24_org").glob("*.mrc"))]
    assert len(maps) == 4
    assert correlation(volume, np.mean(maps, axis=0)) > 0.8


def test_the_map_and_its_halves_are_written_with_the_pixel_size(tmp_path):
    source, _ = known_source(24, images=300)
    volume = consensus_map(tmp_path, source, load_config())
    for name in ("consensus", "consensus_half1", "consensus_half2"):
        with mrcfile.open(tmp_path / "volumes" / f"{name}.mrc") as mrc:
            assert mrc.voxel_size.x == pytest.approx(PIXEL_SIZE)
            assert mrc.data.shape == (24, 24, 24)
    np.testing.assert_array_equal(consensus_map(tmp_path, source, load_config()), volume)  # read back, not made again


@pytest.mark.parametrize(("side", "factor"), [(48, 0.5), (30, 0.8), (25, 1.0), (24, 1.25)])
def test_a_given_map_of_another_box_and_pixel_size_is_resampled_about_its_centre(tmp_path, side, factor):
    source, truth = known_source(24, images=10)
    x = (np.arange(side) - side // 2) * factor + 12
    grid = np.stack(np.meshgrid(x, x, x, indexing="ij"))
    given = map_coordinates(truth, grid, order=5).astype(np.float32)
    write_map(tmp_path / "given.mrc", given, PIXEL_SIZE * factor)
    config = load_config(overrides=[f"consensus.map='{tmp_path}/given.mrc'"])
    volume = consensus_map(tmp_path / "run", source, config)
    inner = (slice(4, 20),) * 3
    assert np.abs(volume - truth)[inner].max() < 0.02 * truth.max()
    assert not (tmp_path / "run" / "volumes" / "consensus_half1.mrc").exists()


def test_a_map_of_dark_protein_is_refused(tmp_path, refusal):
    source, truth = known_source(24, images=10)
    write_map(tmp_path / "dark.mrc", -truth, PIXEL_SIZE)
    config = load_config(overrides=[f"consensus.map='{tmp_path}/dark.mrc'"])
    refusal(SourceError, ["dark.mrc", "inverted"], lambda: consensus_map(tmp_path, source, config))
    assert not (tmp_path / "volumes" / "consensus.mrc").exists()
