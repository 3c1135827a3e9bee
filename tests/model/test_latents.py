"""Latents: rows that are not seen do not move; the encoder's view of an image against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import fourier_shift

from spire_dist.config import LatentConfig, RatesConfig, StageConfig
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.latents import ImageEncoder, LatentTable, build_latents, centred_small_images
from spire_dist.model.mixtures import CoarseMixture
from spire_dist.training.trainer import build_optimisers


def band_limited(box: int, cutoff: float, seed: int = 0):
    """A random image without frequencies at or beyond `cutoff` cycles per pixel."""
    transform = np.fft.fft2(np.random.default_rng(seed).normal(size=(box, box)))
    fy, fx = np.meshgrid(np.fft.fftfreq(box), np.fft.fftfreq(box), indexing="ij")
    return np.fft.ifft2(np.where((np.abs(fx) < cutoff) & (np.abs(fy) < cutoff), transform, 0)).real


@pytest.mark.parametrize(("box", "small"), [(24, 24), (25, 25), (24, 12), (25, 12), (24, 11), (25, 11)])
def test_small_images_are_moved_back_and_cropped(box, small):
    image, shift = band_limited(box, 0.45 * small / box), np.array([1.7, -2.3])  # (x, y)
    shifted = np.fft.ifft2(fourier_shift(np.fft.fft2(image), shift[::-1])).real
    transforms = torch.fft.rfft2(torch.from_numpy(shifted)[None])
    found = centred_small_images(transforms, torch.from_numpy(shift)[None], small)[0].numpy()
    # The crop samples the band-limited image at every box / small pixels, starting from pixel 0.
    whole = np.fft.fft2(image)
    fy, fx = np.fft.fftfreq(box)[:, None], np.fft.fftfreq(box)[None, :]
    for row, column in [(0, 0), (1, 3), (small - 1, 2), (small // 2, small // 2)]:
        y, x = row * box / small, column * box / small
        value = (whole * np.exp(2j * np.pi * (fy * y + fx * x))).sum().real / box**2
        # Scaled so that white noise keeps its variance: a factor box / small.
        assert found[row, column] == pytest.approx(value * box / small, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("small", [12, 13])
def test_white_noise_keeps_its_variance(small):
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 32, 32)))
    found = centred_small_images(torch.fft.rfft2(noise), torch.zeros(200, 2), small)
    assert found.shape == (200, small, small)
    assert float(found.var()) == pytest.approx(
        1.0, abs=0.03 if small % 2 else 0.06
    )  # an even one loses Nyquist's phase


def test_rows_outside_the_batch_do_not_move():
    table = LatentTable(torch.randn(20, 3))
    gaussians = Gaussians(torch.randn(4, 3), torch.ones(4), torch.randn(4, 2))
    optimisers = build_optimisers(CoarseMixture(gaussians, 3, StageConfig(hidden=4)), table, RatesConfig())
    nothing = torch.empty(0)
    for rows in ([1, 5, 7], [5, 9]):  # 1 and 7 have momentum in the second step
        before = table.rows.weight.detach().clone()
        for optimiser in optimisers:
            optimiser.zero_grad()
        seen = torch.tensor(rows)
        table(seen, nothing, nothing, nothing, nothing).square().sum().backward()
        for optimiser in optimisers:
            optimiser.step()
        moved = (table.rows.weight.detach() != before).any(dim=1)
        assert torch.nonzero(moved).flatten().tolist() == rows


def test_the_table_starts_small_and_the_same_for_a_seed():
    config = LatentConfig(kind="table", dimension=3)
    first, second = (build_latents(500, 16, config, torch.Generator().manual_seed(1)) for _ in range(2))
    assert isinstance(first, LatentTable)
    assert isinstance(second, LatentTable)
    assert torch.equal(first.rows.weight, second.rows.weight)
    assert 0 < float(first.rows.weight.detach().std()) < 0.5


@pytest.mark.parametrize("kind", ["encoder", "encoder+table"])
@pytest.mark.parametrize(("box", "encoder_box"), [(16, 32), (33, 16), (24, 15)])
def test_the_encoder_ignores_the_shift_and_the_sign_of_the_ctf(kind, box, encoder_box):
    config = LatentConfig(kind=kind, dimension=2, encoder_width=8, encoder_box=encoder_box)
    encoder = build_latents(10, box, config, torch.Generator())
    assert isinstance(encoder, ImageEncoder)
    image = torch.fft.rfft2(torch.from_numpy(band_limited(box, 0.4)).float()[None])
    rotations, rows = torch.eye(3)[None], torch.tensor([0])
    ctf = torch.where(torch.rand(image.shape) < 0.5, -1.0, 1.0)
    shift = torch.tensor([[2.0, -3.0]])
    fy, fx = torch.fft.fftfreq(box)[:, None], torch.fft.rfftfreq(box)[None, :]
    angle = -2 * torch.pi * (2.0 * fx - 3.0 * fy)
    moved = image * torch.polar(torch.ones_like(angle), angle)
    plain = encoder(rows, image, torch.ones_like(ctf), rotations, torch.zeros(1, 2))
    torch.testing.assert_close(encoder(rows, ctf * moved, ctf, rotations, shift), plain, rtol=1e-3, atol=1e-4)
