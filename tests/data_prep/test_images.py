"""Resampling against direct Fourier sums, background statistics, and the sign of contrast."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.images import (
    background_mask,
    background_statistics,
    centre_contrast,
    protein_sign,
    resample,
    resampling_matrix,
)
from data_prep.picture import contrast_transfer
from spire_dist.physics.ctf import contrast_transfer as torch_contrast_transfer
from spire_dist.physics.ctf import frequency_grid


def _crop(images: np.ndarray, box: int) -> np.ndarray:
    return resample(images.astype(np.float32), resampling_matrix(images.shape[-1], box, float(images.shape[-1])))


def _noise(count: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, box, box)).astype(np.float32)


# --- Fourier cropping ------------------------------------------------------------------------------------------------


@given(box=st.integers(8, 40), cropped=st.integers(8, 40), value=st.floats(-100, 100))
def test_a_constant_image_keeps_its_value(box, cropped, value):
    assume(cropped <= box)
    np.testing.assert_allclose(_crop(np.full((1, box, box), value), cropped), value, atol=1e-4)


@given(cropped=st.integers(8, 20), factor=st.integers(1, 3), x=st.integers(-5, 5), y=st.integers(-5, 5))
@settings(deadline=None)
def test_moving_the_image_by_whole_coarse_pixels_moves_the_cropped_image_as_much(cropped, factor, x, y):
    image = _noise(1, cropped * factor)
    moved_first = _crop(np.roll(image, (y * factor, x * factor), axis=(1, 2)), cropped)
    moved_last = np.roll(_crop(image, cropped), (y, x), axis=(1, 2))
    np.testing.assert_allclose(moved_first, moved_last, atol=1e-4)


@given(box=st.integers(8, 24), cropped=st.integers(8, 24), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_cropping_is_the_sum_over_the_kept_frequencies(box, cropped, seed):
    assume(cropped < box)
    image = _noise(1, box, seed)[0].astype(np.float64)
    # The definition, written out: F(k) about the old centre, summed at the new pixels about the new centre.
    old, new = np.arange(box) - box // 2, (np.arange(cropped) - cropped // 2) * box / cropped
    k = np.arange(-(cropped // 2), cropped // 2 + 1)  # both Nyquist terms of an even box, each at half weight
    weight = np.where(2 * np.abs(k) == cropped, 0.5, 1.0)
    forward = np.exp(-2j * np.pi * np.outer(k, old) / box)
    backward = np.exp(2j * np.pi * np.outer(new, k) / box) * weight
    expected = backward @ (forward @ image @ forward.T) @ backward.T / box**2
    assert np.abs(expected.imag).max() < 1e-9
    np.testing.assert_allclose(_crop(image[None], cropped)[0], expected.real, atol=1e-5)


@pytest.mark.parametrize(("box", "cropped"), [(64, 32), (65, 32), (64, 33), (65, 33), (64, 50)])
def test_the_centre_stays_at_index_half_the_box(box, cropped):
    axis = np.arange(box) - box // 2
    blob = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / 50)
    small = _crop(blob[None], cropped)[0]
    assert np.unravel_index(small.argmax(), small.shape) == (cropped // 2, cropped // 2)
    assert small.max() == pytest.approx(1.0, abs=1e-4)


@given(span=st.floats(20, 32), cropped=st.integers(8, 20), k=st.integers(0, 3), phase=st.floats(0, 6))
@settings(deadline=None)
def test_a_fraction_of_the_field_of_view_samples_a_wave_where_it_is(span, cropped, k, phase):
    """Beside cropping frequencies: any pixel size, here on waves that the coarse grid can hold."""
    box = 32
    assume(k < 0.9 * box * cropped / span / 2)
    wave = np.cos(2 * np.pi * k * (np.arange(box) - box // 2) / box + phase)
    positions = (np.arange(cropped) - cropped // 2) * span / cropped
    expected = np.cos(2 * np.pi * k * positions / box + phase)
    np.testing.assert_allclose(resampling_matrix(box, cropped, span) @ wave, expected, atol=1e-4)


def test_frequencies_beyond_the_new_nyquist_vanish():
    wave = np.cos(2 * np.pi * 13 * np.arange(32) / 32)
    assert np.abs(resampling_matrix(32, 20, 32.0) @ wave).max() < 1e-6  # 13 > 20 / 2


# --- background and sign ---------------------------------------------------------------------------------------------


def test_background_statistics_see_only_what_lies_outside_the_radius():
    images = 2.0 * _noise(3, 64) + 7.0
    mask = background_mask(64, 20.0)
    inside = ~mask
    assert inside[32, 32]
    assert inside[32, 52]
    assert mask[32, 53]
    images[:, inside] = 1e6
    mean, deviation = background_statistics(images, mask)
    np.testing.assert_allclose(mean, 7.0, atol=0.1)
    np.testing.assert_allclose(deviation, 2.0, atol=0.1)


@pytest.mark.parametrize("brightness", [1, -1])
@pytest.mark.parametrize("defocus_um", [0.3, 1.0, 3.0])
def test_the_sign_is_found_in_noisy_images_at_any_defocus(brightness, defocus_um):
    """A molecule-like disc through the CTF of RELION's sign, 200 images at a signal-to-noise ratio of about 0.02."""
    box, pixel_size = 64, 4.0
    axis = (np.arange(box) - box // 2) * pixel_size
    disc = (np.hypot(axis[:, None], axis[None, :]) < 60.0).astype(float)
    ctf = np.array([[1e4 * defocus_um, 1e4 * defocus_um, 0, 300, 2.7, 0.1, 0, 0, 1]])
    image = np.fft.irfft2(np.fft.rfft2(disc) * contrast_transfer(ctf, box, pixel_size)[0], s=(box, box))
    image *= brightness / np.sqrt(50 * image.var())
    contrasts = centre_contrast((image + _noise(200, box)).astype(np.float32))
    assert protein_sign(contrasts) == brightness


def test_the_sign_of_noise_or_of_one_image_cannot_be_told():
    assert [protein_sign(centre_contrast(_noise(200, 32, seed))) for seed in range(20)] == [0] * 20
    assert protein_sign(np.array([3.0])) == 0


@given(
    defocus_a=st.tuples(st.floats(0, 4e4), st.floats(0, 4e4)),
    angle=st.floats(-180, 180),
    rest=st.tuples(*(st.floats(*r) for r in ((60, 300), (0, 3), (0, 1), (0, 180), (0, 200), (0.1, 2)))),
)
@settings(deadline=None, max_examples=25)
def test_the_numpy_ctf_equals_the_training_ctf(defocus_a, angle, rest):
    row = np.array([[*defocus_a, angle, *rest]], dtype=np.float32)
    expected = torch_contrast_transfer(torch.from_numpy(row), *frequency_grid(20, 3.0))
    np.testing.assert_allclose(contrast_transfer(row, 20, 3.0), expected, atol=1e-3)
