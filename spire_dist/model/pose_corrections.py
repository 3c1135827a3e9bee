"""Small corrections of given poses, five numbers per particle: a rotation vector and a shift, both in the image's frame.

    R' = exp([ω]×) R,   t' = t + τ

ω turns the particle, as the image shows it, about the middle of the box: its third number is the angle within the image, the
one that an image tells best. A table (`latent_table`) has ω and τ in units of their step sizes, so that one optimiser with
steps of 1 moves both. The prior ½ |ω / σ_ω|² + ½ |τ / σ_τ|² keeps them small, and is all that tells a turn of every particle
from one of the model.
"""

import math

import torch
from torch import Tensor

from spire_dist.config import PosesConfig

NUMBERS = 5
POSE_BETAS = (0.5, 0.99)
"""Decays of Adam per visit of a particle. Its image is the same each time, so the gradient needs no smoothing, and with the
usual 0.9 a correction swings past its end for half of the few dozen visits that there are."""


def corrected(rotations: Tensor, shifts_px: Tensor, numbers: Tensor, config: PosesConfig) -> tuple[Tensor, Tensor]:
    """Poses [B, 3, 3] and [B, 2] px corrected by a table's `numbers` [B, 5]; differentiable in these."""
    turns = rotations_from_vectors(math.radians(config.rate_deg) * numbers[:, :3])
    return turns @ rotations, shifts_px + config.rate_px * numbers[:, 3:]


def correction_prior(numbers: Tensor, config: PosesConfig) -> Tensor:
    """Minus the logarithm of the prior, [B] nats, of a table's `numbers` [B, 5]."""
    turns = (config.rate_deg / config.prior_deg) * numbers[:, :3]
    shifts = (config.rate_px / config.prior_px) * numbers[:, 3:]
    return 0.5 * (turns.square().sum(1) + shifts.square().sum(1))


def rotations_from_vectors(vectors: Tensor) -> Tensor:
    """Matrices [B, 3, 3] of rotation vectors [B, 3] (axis times angle in radians), differentiable at zero too.

    Rodrigues' formula: 1 + sin θ / θ K + (1 - cos θ) / θ² K² with K the matrix of the cross product.
    """
    angle = torch.linalg.vector_norm(vectors, dim=1)[:, None, None]
    one = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    cross = torch.linalg.cross(vectors[:, None], one[None]).transpose(1, 2)
    half = torch.sinc(angle / (2 * math.pi))  # torch's is sin πx / πx
    return one + torch.sinc(angle / math.pi) * cross + 0.5 * half.square() * (cross @ cross)
