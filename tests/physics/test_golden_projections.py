"""Images that RELION and cryoDRGN's authors projected, made again with our projector and CTF from the same maps."""

import pickle

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from spire_dist.physics.ctf import contrast_transfer, frequency_grid, shift_phases
from spire_dist.physics.poses import matrices_from_relion_angles
from spire_dist.physics.projector import project
from spire_dist.simulation.imaging import noiseless_images

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:mrcfile")  # some of these headers are not quite valid
ASPIRE = "particles/ComputationalCryoEM+ASPIRE-Python"
CRYODRGN = "particles/ml-struct-bio+cryodrgn/tests/data"
POINT_MASS = "particles/bogdantoader+simplecryoem/notebooks/comparisons/data"
WIDTH = 0.7
"""σ in voxels of the Gaussians that stand for a map: where the projector begins not to alias."""


def read_mrc(path):
    with mrcfile.open(path, permissive=True) as file:
        return np.array(file.data, dtype=np.float32)


def read_particles(path):
    blocks = starfile.read(path, always_dict=True)
    table = blocks.get("particles", next(iter(blocks.values())))
    angles = (table[f"rlnAngle{name}"] for name in ("Rot", "Tilt", "Psi"))
    return table, torch.from_numpy(matrices_from_relion_angles(*angles))


def gaussians_of_map(volume, origin=0.0):
    """One Gaussian per voxel whose sum is the map, band-limited: centres (voxels), amplitudes, widths.

    The voxel values are divided by the Gaussian's own transform first. `origin` moves all centres, in voxels.
    """
    box = len(volume)
    frequency = np.fft.fftfreq(box)
    k2 = frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + frequency**2
    sharp = np.fft.ifftn(np.fft.fftn(volume) * np.exp(2 * np.pi**2 * WIDTH**2 * k2)).real
    z, y, x = np.indices(volume.shape).reshape(3, -1) - box // 2
    amplitudes = torch.from_numpy(sharp.ravel() / ((2 * np.pi) ** 1.5 * WIDTH**3)).float()
    return torch.from_numpy(np.stack([x, y, z], 1) + origin).float(), amplitudes, torch.full_like(amplitudes, WIDTH)


def moved(images, shifts_px):
    """Images shifted by (x, y) pixels with wrap-around, as RELION shifts."""
    box = images.shape[-1]
    phases = shift_phases(torch.as_tensor(shifts_px, dtype=torch.float32), *frequency_grid(box, 1.0))
    return torch.fft.irfft2(torch.fft.rfft2(images) * phases, s=(box, box))


def correlations(found, expected):
    return [float(np.corrcoef(np.ravel(f), np.ravel(e))[0, 1]) for f, e in zip(found, expected, strict=True)]


def fourier_cropped_from_index_zero(volume, box):
    """A smaller box out of an uncentred transform: voxel i comes to i × box / D."""
    size = len(volume)
    spectrum = np.fft.fftshift(np.fft.fftn(volume))
    first = size // 2 - box // 2
    kept = spectrum[(slice(first, first + box),) * 3]
    return np.fft.ifftn(np.fft.ifftshift(kept)).real * (box / size) ** 3


def fourier_cropped(volume, box):
    """A smaller box whose centre voxel is the larger one's."""
    rolled = np.fft.ifftshift(volume)
    return np.fft.fftshift(fourier_cropped_from_index_zero(rolled, box))


def test_toy_projections_come_out_of_their_map_and_poses(shared_data):
    """180 voxels of value 1, rotated with trilinear interpolation: as smooth as Gaussians of 0.45 voxel.

    The file's translations (random, in fractions of the box) were not applied to the images.
    """
    volume = read_mrc(shared_data / CRYODRGN / "toymodel_small_nocenter.mrc")
    expected = read_mrc(shared_data / CRYODRGN / "toy_projections.mrcs")
    with open(shared_data / CRYODRGN / "toy_rot_trans.pkl", "rb") as file:
        rotations = torch.from_numpy(np.asarray(pickle.load(file)[0], dtype=np.float32))
    centres = torch.from_numpy(np.argwhere(volume)[:, ::-1] - 15.0).float()
    ones = torch.ones(len(centres))
    images = project(centres, ones, 0.45 * ones, rotations, torch.zeros(1000, 2), box=30, pixel_size=1, cut=5)
    assert min(correlations(images, expected)) > 0.998
    mirrored = project(centres, ones, 0.45 * ones, rotations.mT, torch.zeros(1000, 2), box=30, pixel_size=1, cut=5)
    assert np.mean(correlations(mirrored, expected)) < 0.6


@pytest.mark.parametrize("name", ["rln_proj_65", "rln_proj_65_shifted"])
def test_relion_projections_in_an_odd_box_agree_but_for_relions_own_pixel(shared_data, name):
    """`relion_project` leaves an odd box one pixel too far in x and y.

    It pads the map to an even box, where its origin is handled exactly, and moves the origin of the odd image from
    index 0 by -(D // 2), which ends at (D + 1) / 2 instead of D // 2 (3dem/relion, project.cpp and fftw.h, CenterFFT).
    RELION refines in even boxes only, so this is a property of these files, not a convention: our centre is D // 2.
    """
    expected = read_mrc(shared_data / ASPIRE / f"tests/saved_test_data/{name}.mrcs")
    table, rotations = read_particles(shared_data / ASPIRE / f"tests/saved_test_data/{name}.star")
    volume = read_mrc(shared_data / ASPIRE / "gallery/tutorials/data/clean70SRibosome_vol_65p.mrc")
    centred = project(*gaussians_of_map(volume), rotations, torch.zeros(len(table), 2), box=65, pixel_size=1, cut=5)
    shifts = -table[["rlnOriginX", "rlnOriginY"]].to_numpy() if "rlnOriginX" in table else np.zeros((len(table), 2))
    assert min(correlations(moved(centred, shifts + 1), expected)) > 0.999
    assert max(correlations(moved(centred, shifts), expected)) < 0.95


def test_relion_projections_with_origins_agree_in_an_even_box(shared_data):
    expected = read_mrc(shared_data / ASPIRE / "tests/saved_test_data/rln_proj_64_shifted.mrcs")
    table, rotations = read_particles(shared_data / ASPIRE / "tests/saved_test_data/rln_proj_64_shifted.star")
    volume = fourier_cropped(read_mrc(shared_data / ASPIRE / "gallery/tutorials/data/clean70SRibosome_vol_65p.mrc"), 64)
    centred = project(*gaussians_of_map(volume), rotations, torch.zeros(len(table), 2), box=64, pixel_size=1, cut=5)
    images = moved(centred, -table[["rlnOriginX", "rlnOriginY"]].to_numpy())
    assert min(correlations(images, expected)) > 0.999


def test_relion_projections_without_origins_agree_in_an_even_box(shared_data):
    """The 64 px map of this older set came from an uncentred transform: its centre is at 32 × 64 / 65, 0.49 px off."""
    expected = read_mrc(shared_data / ASPIRE / "tests/saved_test_data/rln_proj_64.mrcs")
    table, rotations = read_particles(shared_data / ASPIRE / "tests/saved_test_data/rln_proj_64.star")
    large = read_mrc(shared_data / ASPIRE / "gallery/tutorials/data/clean70SRibosome_vol_65p.mrc")
    volume = fourier_cropped_from_index_zero(large, 64)
    images = project(*gaussians_of_map(volume), rotations, torch.zeros(len(table), 2), box=64, pixel_size=1, cut=5)
    assert min(correlations(images, expected)) > 0.999


def test_relions_point_mass_agrees_in_pose_shift_and_ctf(shared_data):
    """One voxel at (17, 0, 0), 24 poses, origins, CTFs. RELION projects frequencies inside the Nyquist circle only."""
    volume = read_mrc(shared_data / POINT_MASS / "pointmass.mrc")
    expected = read_mrc(shared_data / POINT_MASS / "relion_proj_batch_pfac2.mrcs")
    table, rotations = read_particles(shared_data / POINT_MASS / "relion_proj_batch_pfac2.star")
    box, pixel_size = 64, 3.54
    z, y, x = np.argwhere(volume)[0] - box // 2
    ctf = torch.zeros(len(table), 9)
    ctf[:, :3] = torch.from_numpy(table[["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]].to_numpy())
    ctf[:, 3:] = torch.tensor([200, 1.4, 0.1, 0, 0, 1])  # the optics table: kV, Cs, amplitude contrast
    shifts = -torch.from_numpy(table[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()).float()
    images = noiseless_images(
        np.array([[x, y, z]]) * pixel_size, np.ones(1), rotations, shifts, ctf,
        resolution=1e-3, box=box, pixel_size=pixel_size,
    )  # fmt: skip
    assert np.mean(correlations(images, expected)) < 0.9  # with the corners of the Fourier square
    grid_x, grid_y = frequency_grid(box, pixel_size)
    inside = torch.hypot(grid_x, grid_y) * 2 * pixel_size <= 1
    images = torch.fft.irfft2(torch.fft.rfft2(images) * inside, s=(box, box))
    assert min(correlations(images, expected)) > 0.995
    flipped = torch.fft.irfft2(torch.fft.rfft2(images) * contrast_transfer(ctf, grid_x, grid_y).sign(), s=(box, box))
    assert max(correlations(flipped, expected)) < 0.5  # the comparison sees the CTF's signs
    scale = float((images * torch.from_numpy(expected)).sum() / (images**2).sum())
    assert scale == pytest.approx(pixel_size**2, rel=0.01)  # RELION sums voxels, ours are per Å²
