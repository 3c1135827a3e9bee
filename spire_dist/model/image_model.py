"""From deformed Gaussians to the images the microscope would have taken, and how far off they are."""

import torch
from torch import Tensor

from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import Backend, project


def render(
    mixture: Mixture,
    latents: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    box: int,
    cut: float,
    backend: Backend = "auto",
) -> Tensor:
    """Projections [B, box, box] of the molecule that `latents` [B, L] describe; rotations [B, 3, 3], shifts_px [B, 2] pixels.

    The projection is in pixels: densities are per pixel length.
    """
    centres, amplitudes = mixture.deform(latents)
    return project(centres, amplitudes, mixture.gaussians.widths_px(), rotations, shifts_px, box, 1.0, cut, backend)


def squared_residuals(projections: Tensor, ctf: Tensor, observed: Tensor) -> Tensor:
    """Σ over pixels of (image - CTF · projection)² per image [B], of projections [B, D, D].

    ctf and the images' transforms `observed` are [B, D, D // 2 + 1]; neither gets a gradient. The CTF multiplies in the
    stored box, without padding, as particle images are made and corrected. One transform each way.
    """
    return _Residuals.apply(projections, ctf, observed)  # type: ignore[return-value]


class _Residuals(torch.autograd.Function):
    """By Parseval, ∂/∂P Σ|I - CTF P|² = 2 CTF (CTF P - I) of the transforms: the residual is all that must be kept."""

    @staticmethod
    def forward(ctx, projections, ctf, observed):
        residual = torch.fft.rfft2(projections).mul_(ctf).sub_(observed)
        ctx.save_for_backward(residual, ctf)
        box = projections.shape[-1]
        numbers = torch.view_as_real(residual)
        # All columns but the first (and, for even D, the last) stand for two frequencies.
        single = numbers[:, :, :: box // 2] if box % 2 == 0 else numbers[:, :, :1]
        squares = 2 * torch.linalg.vector_norm(numbers, dim=(1, 2, 3)).square()
        return (squares - torch.linalg.vector_norm(single, dim=(1, 2, 3)).square()) / box**2

    @staticmethod
    def backward(ctx, *gradients):
        residual, ctf = ctx.saved_tensors
        box = residual.shape[-2]
        return torch.fft.irfft2(residual * (ctf * (2 * gradients[0])[:, None, None]), s=(box, box)), None, None
