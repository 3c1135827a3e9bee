"""The CTF against torch-ctf and against values of cryoDRGN's, which has the opposite sign."""

import numpy as np
import pytest
import torch
from torch_ctf import calculate_ctf_2d

from spire_dist.physics.ctf import contrast_transfer, frequency_grid, shift_phases, wavelength_a
from spire_dist.schema import CTF_COLUMNS, NO_CTF

SX = torch.tensor([0, 0.02, 0.05, 0.1, 0, 0.1, -0.1], dtype=torch.float64)
SY = torch.tensor([0, 0, 0, 0, 0.1, 0.1, 0.1], dtype=torch.float64)
CRYODRGN = [  # U, V, angle, kV, Cs, w, phase shift; values at (SX, SY)
    ((15000, 15000, 0, 300, 2.7, 0.1, 0), (-0.1, -0.453961, -0.662485, -0.079621, -0.079621, 0.318645, 0.318645)),
    ((20000, 15000, 30, 300, 2.7, 0.1, 0), (-0.1, -0.534553, -0.143802, 0.784557, 0.639156, 0.742602, -0.089885)),
    ((15000, 15000, 0, 200, 2.0, 0.07, 90), (-0.997547, -0.856318, 0.992794, -0.746622, -0.746622, 0.053991, 0.053991)),
]


def parameters(*first_seven: float, b_factor: float = 0, scale: float = 1) -> torch.Tensor:
    return torch.tensor([[*first_seven, b_factor, scale]], dtype=torch.float64)


@pytest.mark.parametrize(("row", "values"), CRYODRGN)
def test_ctf_is_the_negative_of_cryodrgns(row, values):
    ctf = contrast_transfer(parameters(*row), SX[None], SY[None])
    np.testing.assert_allclose(ctf[0, 0], -np.array(values), atol=1e-5)


@pytest.mark.parametrize(("voltage_kv", "expected"), [(100, 0.0370133), (200, 0.0250787), (300, 0.0196870)])
def test_wavelength_is_that_of_the_tables(voltage_kv, expected):
    assert wavelength_a(torch.tensor(voltage_kv, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("box", [64, 65])
def test_ctf_agrees_with_torch_ctf_over_a_spread_of_parameters(box):
    rng = np.random.default_rng(0)
    grid = frequency_grid(box, 2.5)
    for _ in range(20):
        v, u = sorted(rng.uniform(5000, 30000, 2))
        angle, voltage, cs = rng.uniform(0, 180), rng.choice([200.0, 300.0]), rng.uniform(0.01, 2.7)
        w, phase = rng.uniform(0.05, 0.15), rng.uniform(0, 120)
        expected = calculate_ctf_2d(
            defocus=(u + v) / 2e4,
            astigmatism=(u - v) / 2e4,
            astigmatism_angle=angle,
            voltage=voltage,
            spherical_aberration=cs,
            amplitude_contrast=w,
            phase_shift=phase,
            pixel_size=2.5,
            image_shape=(box, box),
            rfft=True,
            fftshift=False,
        )
        found = contrast_transfer(parameters(u, v, angle, voltage, cs, w, phase), *grid)[0]
        # Its wavelength differs by 3e-5, and its phases are float32.
        assert torch.dist(found, expected) / expected.norm() < 5e-3


def test_frequencies_are_those_of_the_real_transform():
    grid_x, grid_y = frequency_grid(6, 2.0)
    np.testing.assert_allclose(grid_x[0], np.fft.rfftfreq(6, 2.0), atol=1e-7)
    np.testing.assert_allclose(grid_y[:, 0], np.fft.fftfreq(6, 2.0), atol=1e-7)


def test_row_without_a_microscope_multiplies_by_one():
    assert torch.allclose(contrast_transfer(torch.tensor([NO_CTF]), *frequency_grid(32, 1.3)), torch.ones(1), atol=1e-6)


def test_b_factor_and_scale_are_an_envelope_and_a_factor():
    row = CRYODRGN[1][0]
    plain = contrast_transfer(parameters(*row), SX[None], SY[None])
    damped = contrast_transfer(parameters(*row, b_factor=100, scale=3), SX[None], SY[None])
    envelope = 3 * torch.exp(-100 * (SX**2 + SY**2) / 4)
    np.testing.assert_allclose(damped, plain * envelope, atol=1e-12)
    assert CTF_COLUMNS[7:] == ("b_factor_a2", "scale")


def test_each_particle_has_its_own_ctf():
    rows = torch.cat([parameters(*row) for row, _ in CRYODRGN])
    together = contrast_transfer(rows, *frequency_grid(16, 3.0))
    for i, (row, _) in enumerate(CRYODRGN):
        assert torch.equal(together[i], contrast_transfer(parameters(*row), *frequency_grid(16, 3.0))[0])


@pytest.mark.parametrize("box", [32, 33])
def test_shift_phases_move_an_image_towards_larger_x_and_y(box):
    image = torch.randn(box, box, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = [g.double() for g in frequency_grid(box, 1.5)]
    shifts = torch.tensor([[1.5 * 3, -1.5 * 5]], dtype=torch.float64)  # Å: 3 px in x, -5 px in y
    moved = torch.fft.irfft2(torch.fft.rfft2(image)[None] * shift_phases(shifts, *grid), s=(box, box))[0]
    assert torch.allclose(moved, torch.roll(image, (-5, 3), (0, 1)), atol=1e-4)
