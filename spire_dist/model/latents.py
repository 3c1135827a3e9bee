"""Latents: one vector per particle, free (`latent_table.py`) or read off the image, by the encoder here."""

import torch
from torch import Tensor, nn

from spire_dist.config import LatentConfig
from spire_dist.physics.ctf import frequency_grid, shift_phases

START_SPREAD = 0.1
"""Standard deviation of a table's start: enough to break the symmetry between particles."""


class ImageEncoder(nn.Module):
    """Amortised inference: image and pose -> latent.

    The image is centred by its known shift, corrected for the CTF's sign and cropped in Fourier space to a small box, so
    that the network has to learn neither shifts nor CTF; the rotation matrix tells it the view.
    """

    def __init__(self, box: int, config: LatentConfig) -> None:
        super().__init__()
        self.small = min(box, config.encoder_box)
        width = config.encoder_width
        self.layers = nn.Sequential(
            nn.Linear(self.small**2 + 9, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, config.dimension),
        )

    def forward(self, images: Tensor, ctf: Tensor, rotations: Tensor, shifts_px: Tensor) -> Tensor:
        """Latents [B, L] from transforms `images` and `ctf` [B, D, D // 2 + 1], rotations [B, 3, 3], shifts [B, 2] px."""
        small = centred_small_images(images * torch.sign(ctf), shifts_px, self.small)
        return self.layers(torch.cat([small.flatten(1), rotations.flatten(1)], dim=1))


def centred_small_images(transforms: Tensor, shifts_px: Tensor, small: int) -> Tensor:
    """Images [B, small, small], variance kept near one, moved back by `shifts_px` [B, 2] and Fourier-cropped."""
    if len(transforms) == 0:  # of a rank that has no particle in a step: the transform refuses it
        return transforms.real.new_zeros(0, small, small)
    box = transforms.shape[-2]
    half = small // 2
    rows = torch.cat([transforms[:, : small - half], transforms[:, box - half :]], dim=1)
    back = shift_phases(-shifts_px, *frequency_grid(small, box / small, transforms.device))
    return torch.fft.irfft2(rows[:, :, : half + 1] * back, s=(small, small)) * (small / box)


def starting_latents(count: int, dimension: int, seed: int) -> Tensor:
    """Latents [count, dimension] that a table starts with."""
    return START_SPREAD * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
