"""Noiseless images and true maps: band limit, units, and agreement with each other and with other programs' code."""

import numpy as np
import pytest
import roma
import torch
from scipy import ndimage
from torch_ctf import calculate_ctf_2d

from spire_dist.physics.poses import random_rotations
from spire_dist.simulation.imaging import noiseless_images, true_volume
from spire_dist.simulation.molecules import procedural_antibody


@pytest.fixture(scope="module")
def beads():
    molecule = procedural_antibody(0)
    return molecule.coordinates - molecule.coordinates.mean(axis=0), molecule.weights


def fourier_sum(coordinates, weights, sigma, box, pixel_size):
    """Transform of the projection along z, straight from its formula: Σ w exp(-2π² σ² s²) exp(-2πi s·c), [box, box]."""
    s = np.fft.fftfreq(box, pixel_size)
    phases = [np.exp(-2j * np.pi * s[:, None] * coordinates[:, axis]) for axis in (1, 0)]  # [box, A] for y and x
    return (phases[0] * weights) @ phases[1].T * np.exp(-2 * np.pi**2 * sigma**2 * (s[:, None] ** 2 + s**2))


@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("resolution", [3.0, 40.0])
def test_image_is_the_band_limited_projection_whatever_the_atoms_width(beads, box, resolution):
    pixel_size = 6.0
    pose = torch.eye(3)[None], torch.tensor([[7.0, -11.0]])
    image = noiseless_images(*beads, *pose, None, resolution=resolution, box=box, pixel_size=pixel_size)[0].numpy()
    expected = fourier_sum(beads[0] + [7, -11, 0], beads[1], 0.225 * resolution, box, pixel_size)
    if box % 2 == 0:
        expected[box // 2] = expected[:, box // 2] = 0
    found = np.fft.fft2(np.fft.ifftshift(image)) * pixel_size**2
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("box", [48, 49])
def test_map_holds_the_electrons_and_projects_to_the_image(beads, box):
    volume = true_volume(*beads, resolution=3.0, box=box, pixel_size=6.0)
    assert float(volume.sum()) * 6.0**3 == pytest.approx(beads[1].sum(), rel=1e-5)
    along_x = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # image x is the molecule's z
    pose = torch.stack([torch.eye(3), along_x]), torch.tensor([[0.0, 0.0], [12.0, -18.0]])
    images = noiseless_images(*beads, *pose, None, resolution=3.0, box=box, pixel_size=6.0)
    assert torch.allclose(images[0], volume.sum(0) * 6.0, atol=1e-5 * float(images.max()))
    expected = torch.roll(volume.sum(2).T * 6.0, (-3, 2), (0, 1))
    assert torch.allclose(images[1], expected, atol=1e-5 * float(images.max()))


def test_image_is_the_ctf_times_the_projection_of_the_rotated_map_in_other_programs_hands(beads):
    """The map turned by scipy's splines, roma's matrix, torch-ctf's CTF and scipy's Fourier shift."""
    box, pixel_size, resolution = 72, 4.0, 30.0  # smooth, so that the splines are not what is tested
    rotations = random_rotations(3, seed=2)
    shifts = np.array([[9.0, -14.0], [-20.0, 3.0], [0.5, 30.0]], dtype=np.float32)
    ctf = np.tile(np.array([18000, 14000, 35, 300, 2.7, 0.1, 0, 0, 1], dtype=np.float32), (3, 1))
    images = noiseless_images(
        *beads, *map(torch.from_numpy, (rotations, shifts, ctf)), resolution=resolution, box=box, pixel_size=pixel_size
    ).numpy()
    volume = true_volume(*beads, resolution=resolution, box=box, pixel_size=pixel_size).numpy()
    transfer = calculate_ctf_2d(
        defocus=1.6, astigmatism=0.2, astigmatism_angle=35, phase_shift=0, amplitude_contrast=0.1, voltage=300,
        spherical_aberration=2.7, pixel_size=pixel_size, image_shape=(box, box), rfft=False, fftshift=False,
    ).numpy()  # fmt: skip
    for image, rotation, shift in zip(images, rotations, shifts, strict=True):
        vector = roma.rotmat_to_rotvec(torch.from_numpy(rotation).double())
        back = roma.rotvec_to_rotmat(-vector).numpy()[::-1, ::-1]  # r_volume = Rᵀ r_image, in [z, y, x]
        centre = np.full(3, box // 2)
        turned = ndimage.affine_transform(volume, back, offset=centre - back @ centre, order=5)
        spectrum = ndimage.fourier_shift(np.fft.fft2(turned.sum(0) * pixel_size), shift[::-1] / pixel_size)
        expected = np.fft.ifft2(spectrum * transfer).real
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.9999
        assert np.linalg.norm(image - expected) < 0.01 * np.linalg.norm(expected)


def test_dark_protein_is_the_negative_image(beads):
    pose = torch.eye(3)[None], torch.zeros(1, 2), None
    bright = noiseless_images(*beads, *pose, resolution=3.0, box=40, pixel_size=8.0)
    dark = noiseless_images(*beads, *pose, resolution=3.0, box=40, pixel_size=8.0, sign=-1)
    assert torch.equal(bright, -dark)


@pytest.mark.gpu
def test_gpu_makes_the_images_that_the_cpu_makes(beads):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    pose = [torch.from_numpy(random_rotations(5, seed=1)), 20 * torch.rand(5, 2)]
    ctf = torch.tensor([[18000, 14000, 35, 300, 2.7, 0.1, 0, 100, 1.0]]).repeat(5, 1)
    own, other = (
        noiseless_images(*beads, *(t.to(device) for t in (*pose, ctf)), resolution=3.0, box=64, pixel_size=6.0).cpu()
        for device in ("cpu", "cuda")
    )
    assert float((own - other).norm()) < 1e-4 * float(own.norm())
