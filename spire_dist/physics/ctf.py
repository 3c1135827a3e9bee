"""The contrast transfer function in RELION's parameters and sign: bright-protein image = CTF × projection.

Formula (3dem/relion, ctf.h; checked against torch-ctf and cryoDRGN's values, whose sign is the opposite):

    λ = 12.2639 / √(V + 0.97845e-6 V²)                      Å, V in volts
    Δ(α) = (U + V + (U - V) cos 2(α - angle)) / 2           Å, underfocus positive
    χ = π λ Δ s² - (π/2) Cs λ³ s⁴ + phase shift
    CTF = scale · (√(1 - w²) sin χ + w cos χ) · exp(-B s² / 4)
"""

import math

import torch
from torch import Tensor

from spire_dist.schema import CTF_COLUMNS


def frequency_grid(box: int, pixel_size: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Spatial frequencies (s_x, s_y) in 1/Å of a real-to-complex transform, each [box, box // 2 + 1]."""
    s_y = torch.fft.fftfreq(box, d=pixel_size, device=device)
    s_x = torch.fft.rfftfreq(box, d=pixel_size, device=device)
    grid_y, grid_x = torch.meshgrid(s_y, s_x, indexing="ij")
    return grid_x, grid_y


def wavelength_a(voltage_kv: Tensor) -> Tensor:
    """Relativistic electron wavelength in Å (0.0197 at 300 kV)."""
    volts = 1e3 * voltage_kv
    return 12.2639 / torch.sqrt(volts + 0.97845e-6 * volts**2)


def contrast_transfer(parameters: Tensor, grid_x: Tensor, grid_y: Tensor) -> Tensor:
    """CTF [B, ...] of `parameters` [B, 9] (columns `schema.CTF_COLUMNS`) at frequencies [...] in 1/Å.

    √(1-w²) sin χ + w cos χ = sin(χ + arcsin w), and χ is a sum of five fixed functions of the frequency, so a batch costs
    one small matrix product and one sine. Computed in float64 (χ may exceed 10³) and returned in the grid's type.
    """
    columns = dict(zip(CTF_COLUMNS, parameters.to(torch.float64).unbind(dim=1), strict=True))
    x, y = grid_x.to(torch.float64), grid_y.to(torch.float64)
    s2 = x**2 + y**2
    # s² cos 2α and s² sin 2α of the azimuth α, without the angle itself
    functions = torch.stack([s2, x**2 - y**2, 2 * x * y, s2**2, torch.ones_like(s2)])
    lam = wavelength_a(columns["voltage_kv"])
    mean = math.pi * lam * (columns["defocus_u_a"] + columns["defocus_v_a"]) / 2
    difference = math.pi * lam * (columns["defocus_u_a"] - columns["defocus_v_a"]) / 2
    twice = 2 * torch.deg2rad(columns["defocus_angle_deg"])
    spherical = -(math.pi / 2) * (1e7 * columns["cs_mm"]) * lam**3
    constant = torch.deg2rad(columns["phase_shift_deg"]) + torch.asin(columns["amplitude_contrast"])
    weights = [mean, difference * torch.cos(twice), difference * torch.sin(twice), spherical, constant]
    ctf = torch.sin(torch.tensordot(torch.stack(weights, dim=1), functions, dims=1))
    beyond = (...,) + (None,) * grid_x.dim()
    if parameters.is_cuda or columns["b_factor_a2"].any():  # to ask a GPU is to wait for it
        ctf = ctf * torch.exp(-columns["b_factor_a2"][beyond] * s2 / 4)
    return (columns["scale"][beyond] * ctf).to(grid_x.dtype)


def shift_phases(shifts: Tensor, grid_x: Tensor, grid_y: Tensor) -> Tensor:
    """exp(-2πi s·t) [B, ...]: multiplying a transform by it moves the image by `shifts` [B, 2] Å, (x, y)."""
    angle = -2 * math.pi * (shifts[:, 0, None, None] * grid_x[None] + shifts[:, 1, None, None] * grid_y[None])
    return torch.polar(torch.ones_like(angle), angle)
