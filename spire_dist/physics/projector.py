"""Projection of isotropic 3-D Gaussians to images, and their rasterisation to a map.

Density `V(p) = Σ_i m_i exp(-‖p - c_i‖² / (2 s_i²))`; its exact line integral along z after `c' = R c + t` is
`P(q) = Σ_i m_i √(2π) s_i exp(-‖q - c'_i‖² / (2 s_i²))` (CryoSPIRE equations 1 and 2). Both are sampled at pixel centres, the
origin at index `box // 2`. This is the point-sampled form: below a width of about 0.7 px it aliases.

Two backends behind one signature: `torch`, a dense separable sum that works on any device and in float64 and is the
reference, and `numba`, the local splat of `kernels_cpu`. The tensors' device and type choose, unless told.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from spire_dist.physics import kernels_cpu

Backend = Literal["torch", "numba"]
DEFAULT_CUT = 4.0
"""Standard deviations at which the local splat ends: relative error 3e-5 in the image, 2e-4 in the centres' gradient."""


def choose_backend(tensor: Tensor) -> Backend:
    """`numba` for float32 on the CPU, `torch` for anything else."""
    return "numba" if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else "torch"


def project(
    centres: Tensor,
    amplitudes: Tensor,
    widths: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    box: int,
    pixel_size: float,
    cut: float = DEFAULT_CUT,
    backend: Backend | None = None,
) -> Tensor:
    """Images [B, box, box] (density × Å) of Gaussians seen in the poses of B particles; differentiable in the first three.

    centres     [N, 3] or [B, N, 3], Å, (x, y, z) from the centre of the box
    amplitudes  [N] or [B, N], peak density
    widths      [N], Å, standard deviation, positive
    rotations   [B, 3, 3], r_image = R @ r_volume; shifts [B, 2], Å, (x, y)
    cut         standard deviations at which a Gaussian ends (the dense `torch` backend sums to the edge of the box)
    """
    planar = centres @ rotations[:, :2].transpose(1, 2) + shifts[:, None, :]  # [B, N, 2]
    weights = amplitudes * (math.sqrt(2 * math.pi) * widths)
    centres_px = planar / pixel_size + box // 2
    weights = weights.expand(centres_px.shape[:2])
    widths_px = widths / pixel_size
    if (backend or choose_backend(centres_px)) == "numba":
        return _LocalSplat.apply(centres_px, weights, widths_px, box, cut)  # type: ignore[return-value]
    return splat_dense(centres_px, weights, widths_px, box)


def splat_dense(centres_px: Tensor, weights: Tensor, widths_px: Tensor, box: int) -> Tensor:
    """The reference: every Gaussian on every pixel. centres [B, N, 2] px, weights [B, N], widths [N] px -> [B, box, box]."""
    pixels = torch.arange(box, dtype=centres_px.dtype, device=centres_px.device)
    factor = -0.5 / widths_px**2  # [N]
    profile_x = torch.exp(factor[:, None] * (pixels - centres_px[..., 0:1]) ** 2)  # [B, N, box]
    profile_y = torch.exp(factor[:, None] * (pixels - centres_px[..., 1:2]) ** 2) * weights[..., None]
    return profile_y.transpose(1, 2) @ profile_x


class _LocalSplat(torch.autograd.Function):
    """`kernels_cpu` seen by autograd."""

    @staticmethod
    def forward(ctx, centres_px, weights, widths_px, box, cut):
        centres_px, weights, widths_px = centres_px.contiguous(), weights.contiguous(), widths_px.contiguous()
        images = centres_px.new_zeros(len(centres_px), box, box)
        points, shares, sigmas = (t.detach().numpy() for t in (centres_px, weights, widths_px))
        kernels_cpu.splat_forward(points, shares, sigmas, cut, box, images.numpy())
        ctx.save_for_backward(centres_px, weights, widths_px)
        ctx.cut = cut
        return images

    @staticmethod
    def backward(ctx, *gradients):
        centres_px, weights, widths_px = ctx.saved_tensors
        d_centres, d_weights, d_widths = (torch.empty_like(t) for t in (centres_px, weights, weights))
        points, shares, sigmas = (t.detach().numpy() for t in (centres_px, weights, widths_px))
        gradient = gradients[0].contiguous().numpy()
        outputs = (d_centres.numpy(), d_weights.numpy(), d_widths.numpy())
        kernels_cpu.splat_backward(points, shares, sigmas, ctx.cut, gradient, outputs[0], outputs[1], outputs[2])
        return d_centres, d_weights, d_widths.sum(dim=0), None, None


def render_volume(
    centres: Tensor, amplitudes: Tensor, widths: Tensor, box: int, pixel_size: float, cut: float = DEFAULT_CUT
) -> Tensor:
    """Map [box, box, box], indexed [z, y, x], of Gaussians: centres [N, 3] Å, amplitudes [N], widths [N] Å.

    Not differentiable. Computed on the CPU in float32, returned there.
    """
    volume = torch.zeros(box, box, box)
    pixels = (centres / pixel_size + box // 2, amplitudes, widths / pixel_size)
    points, shares, sigmas = (t.detach().to("cpu", torch.float32).contiguous().numpy() for t in pixels)
    kernels_cpu.rasterise(points, shares, sigmas, cut, volume.numpy())
    return volume
