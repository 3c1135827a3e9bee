"""Latents: how a table starts; the encoder's view of an image against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import fourier_shift

from spire_dist.config import LatentConfig
from spire_dist.model.latents import ImageEncoder, centred_small_images, starting_latents


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


def test_latents_start_small_and_the_same_for_a_seed():
    first, second, third = (starting_latents(500, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert 0 < float(first.std()) < 0.5


@pytest.mark.parametrize("kind", ["encoder", "encoder+table"])
@pytest.mark.parametrize(("box", "encoder_box"), [(16, 32), (33, 16), (24, 15)])
def test_the_encoder_ignores_the_shift_and_the_sign_of_the_ctf(kind, box, encoder_box):
    config = LatentConfig(kind=kind, dimension=2, encoder_width=8, encoder_box=encoder_box)
    encoder = ImageEncoder(box, config)
    image = torch.fft.rfft2(torch.from_numpy(band_limited(box, 0.4)).float()[None])
    rotations = torch.eye(3)[None]
    ctf = torch.where(torch.rand(image.shape) < 0.5, -1.0, 1.0)
    shift = torch.tensor([[2.0, -3.0]])
    fy, fx = torch.fft.fftfreq(box)[:, None], torch.fft.rfftfreq(box)[None, :]
    angle = -2 * torch.pi * (2.0 * fx - 3.0 * fy)
    moved = image * torch.polar(torch.ones_like(angle), angle)
    plain = encoder(image, torch.ones_like(ctf), rotations, torch.zeros(1, 2))
    torch.testing.assert_close(encoder(ctf * moved, ctf, rotations, shift), plain, rtol=1e-3, atol=1e-4)


def test_no_image_has_no_latent_but_a_gradient_of_zero():
    """A rank may have no particle in the last step of an epoch; its encoder's gradient is added to the others' all the same."""
    encoder = ImageEncoder(24, LatentConfig(dimension=4, encoder_box=16, encoder_width=8))
    nothing = torch.zeros(0, 24, 13)
    latents = encoder(nothing + 0j, nothing, torch.zeros(0, 3, 3), torch.zeros(0, 2))
    assert latents.shape == (0, 4)
    latents.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in encoder.parameters())
