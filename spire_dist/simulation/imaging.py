"""From atoms to noiseless images and true maps, in one and the same band limit. Called by `simulate.simulate`.

Atoms are Gaussians (ChimeraX's molmap: σ = 0.225 × resolution), often far narrower than a pixel, where point sampling
aliases. So they are drawn on a grid twice as fine with a width w of one fine pixel, which aliases by less than 1e-4
inside the band that is kept; in Fourier space the exact factor exp(-2π²(σ² - w²)s²) makes good the width, and the
transform is cropped. Images and maps agree: an image is the CTF times a central slice of the map.
"""

import math

import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.physics import projector
from spire_dist.physics.ctf import contrast_transfer, frequency_grid

OVERSAMPLING = 2
MOLMAP_WIDTH = 0.225
"""σ of an atom, in units of the resolution (ChimeraX molmap's default, 1 / (π √2))."""
CUT = 5.0
PAIRS_PER_CHUNK = 2**21
"""(image, atom) pairs projected at once: bounds the memory at about 50 MB."""


def images_per_chunk(atoms: int) -> int:
    """How many images fit into one call of `noiseless_images`."""
    return max(1, min(256, PAIRS_PER_CHUNK // atoms))


def noiseless_images(
    coordinates: NDArray,
    weights: NDArray,
    rotations: Tensor,
    shifts: Tensor,
    ctf: Tensor | None,
    *,
    resolution: float,
    box: int,
    pixel_size: float,
    sign: int = 1,
) -> Tensor:
    """Sign × CTF × projection, [B, box, box], electrons/Å², band-limited to the box.

    coordinates [A, 3] Å, weights [A] electrons, rotations [B, 3, 3], shifts [B, 2] Å, ctf [B, 9] (None: no microscope),
    resolution Å, pixel_size Å/px. Computed where the rotations are.
    """
    device = rotations.device
    centres, amplitudes, widths = (t.to(device) for t in _drawable(coordinates, weights, pixel_size))
    fine = projector.project(
        centres,
        amplitudes,
        widths,
        rotations.float(),
        shifts.float(),
        box * OVERSAMPLING,
        pixel_size / OVERSAMPLING,
        cut=CUT,
    )
    spectrum = _cropped(torch.fft.rfft2(torch.fft.ifftshift(fine, dim=(1, 2))), box, dims=(1,))
    grid_x, grid_y = frequency_grid(box, pixel_size, device)
    spectrum = spectrum * _width_correction(grid_x**2 + grid_y**2, resolution, pixel_size)
    if ctf is not None:
        spectrum = spectrum * contrast_transfer(ctf, grid_x, grid_y)
    return torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(box, box)), dim=(1, 2)) * (sign / OVERSAMPLING**2)


def true_volume(coordinates: NDArray, weights: NDArray, resolution: float, box: int, pixel_size: float) -> Tensor:
    """The map [box, box, box] (z, y, x), electrons/Å³, whose projections are `noiseless_images`."""
    centres, amplitudes, widths = _drawable(coordinates, weights, pixel_size)
    fine = projector.render_volume(centres, amplitudes, widths, box * OVERSAMPLING, pixel_size / OVERSAMPLING, cut=CUT)
    axes = (0, 1, 2)
    spectrum = _cropped(torch.fft.rfftn(torch.fft.ifftshift(fine, dim=axes)), box, dims=(0, 1))
    grid_x, grid_y = frequency_grid(box, pixel_size)
    s_z = torch.fft.fftfreq(box, d=pixel_size)
    spectrum = spectrum * _width_correction(s_z[:, None, None] ** 2 + grid_x**2 + grid_y**2, resolution, pixel_size)
    return torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(box,) * 3), dim=axes) / OVERSAMPLING**3


def _drawable(coordinates: NDArray, weights: NDArray, pixel_size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, peak densities and widths (one fine pixel) of atoms, float32."""
    width = pixel_size / OVERSAMPLING
    centres = torch.as_tensor(coordinates, dtype=torch.float32)
    amplitudes = torch.as_tensor(weights, dtype=torch.float32) / ((2 * math.pi) ** 1.5 * width**3)
    return centres, amplitudes, torch.full((len(centres),), width)


def _width_correction(s2: Tensor, resolution: float, pixel_size: float) -> Tensor:
    """Turns Gaussians of one fine pixel into those of the resolution; s2 in 1/Å²."""
    surplus = (MOLMAP_WIDTH * resolution) ** 2 - (pixel_size / OVERSAMPLING) ** 2
    return torch.exp(-2 * math.pi**2 * surplus * s2)


def _cropped(spectrum: Tensor, box: int, dims: tuple[int, ...]) -> Tensor:
    """The frequencies of a `box` grid from a finer real-to-complex transform; Nyquist, which has no partner, is 0."""
    positive, negative = (box + 1) // 2, (box - 1) // 2
    out = spectrum[..., : box // 2 + 1].clone()
    for dim in dims:
        size = out.shape[dim]
        parts = [out.narrow(dim, 0, positive), out.narrow(dim, size - negative, negative)]
        if box % 2 == 0:
            parts.insert(1, torch.zeros_like(out.narrow(dim, 0, 1)))
        out = torch.cat(parts, dim=dim)
    if box % 2 == 0:
        out[..., -1] = 0
    return out
