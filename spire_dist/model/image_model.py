"""From deformed Gaussians to the images the microscope would have taken, and how far off they are."""

import torch
from torch import Tensor

from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import project


def predict(
    mixture: Mixture, latents: Tensor, rotations: Tensor, shifts_px: Tensor, ctf: Tensor, box: int, cut: float
) -> Tensor:
    """Transforms [B, box, box // 2 + 1] of the noiseless images of particles with `latents` [B, L].

    rotations [B, 3, 3], shifts_px [B, 2] pixels, ctf [B, box, box // 2 + 1]. The CTF multiplies in the stored box, without
    padding, as particle images are made and corrected. The projection is in pixels: densities are per pixel length.
    """
    centres, amplitudes = mixture.deform(latents)
    widths = mixture.gaussians.widths_px()
    return ctf * torch.fft.rfft2(project(centres, amplitudes, widths, rotations, shifts_px, box, 1.0, cut))


def squared_residuals(predicted: Tensor, observed: Tensor) -> Tensor:
    """Σ over pixels of (image - model)² per image [B], from real-to-complex transforms [B, D, D // 2 + 1], by Parseval.

    All columns but the first (and, for even D, the last) stand for two frequencies.
    """
    box = predicted.shape[-2]
    counts = torch.full((predicted.shape[-1],), 2.0, device=predicted.device)
    counts[0] = 1.0
    if box % 2 == 0:
        counts[-1] = 1.0
    difference = torch.view_as_real(predicted - observed)
    return (difference.square().sum(-1) * counts).sum((-2, -1)) / box**2
