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

    Computed in float64 (at 4 µm defocus and 3 Å the phase exceeds 10³ radians... a float32 phase would be off by 1e-4)
    and returned in the grid's type.
    """
    columns = dict(zip(CTF_COLUMNS, parameters.to(torch.float64)[..., None, None].unbind(dim=1), strict=True))
    x, y = grid_x.to(torch.float64)[None], grid_y.to(torch.float64)[None]
    s2 = x**2 + y**2
    lam = wavelength_a(columns["voltage_kv"])
    mean = (columns["defocus_u_a"] + columns["defocus_v_a"]) / 2
    difference = (columns["defocus_u_a"] - columns["defocus_v_a"]) / 2
    azimuth = 2 * (torch.atan2(y, x) - torch.deg2rad(columns["defocus_angle_deg"]))
    defocus = mean + difference * torch.cos(azimuth)
    chi = math.pi * lam * defocus * s2 - (math.pi / 2) * (1e7 * columns["cs_mm"]) * lam**3 * s2**2
    chi = chi + torch.deg2rad(columns["phase_shift_deg"])
    w = columns["amplitude_contrast"]
    ctf = torch.sqrt(1 - w**2) * torch.sin(chi) + w * torch.cos(chi)
    return (columns["scale"] * ctf * torch.exp(-columns["b_factor_a2"] * s2 / 4)).to(grid_x.dtype)


def shift_phases(shifts: Tensor, grid_x: Tensor, grid_y: Tensor) -> Tensor:
    """exp(-2πi s·t) [B, ...]: multiplying a transform by it moves the image by `shifts` [B, 2] Å, (x, y)."""
    angle = -2 * math.pi * (shifts[:, 0, None, None] * grid_x[None] + shifts[:, 1, None, None] * grid_y[None])
    return torch.polar(torch.ones_like(angle), angle)
