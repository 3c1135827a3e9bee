"""Latents that jump: a particle tries those of other particles, and takes one that explains its image better.

A gradient leads a free latent into the nearest valley only, and one noisy image has many: where states lie apart, particles
stay among those of another state, and blur it. The latents of a step's particles are samples of where states are, the better
the longer training goes on. A few of them are tried by all particles of the step, which takes a pass forward of one molecule
each, not of one for every image.
"""

import numpy as np
import torch
from torch import Tensor

from spire_dist.data.loader import Batch
from spire_dist.distributed.collectives import gather
from spire_dist.distributed.mesh import Mesh

NOBODY = 2**62
"""A row of the store behind all others, in the places that a rank's batch lacks."""


@torch.no_grad()
def drawn_latents(mesh: Mesh, batch: Batch, latents: Tensor, places: int, count: int, seed: tuple[int, ...]) -> Tensor:
    """`count` of the latents [count, L] of the whole step's particles, of which a rank has `latents` [B, L] and `places`.

    The same on every rank and for any number of ranks. All ranks call this together.
    """
    rows, values = batch.rows, latents.detach()
    if mesh.world > 1:
        lacking = places - len(latents)
        rows = gather(torch.nn.functional.pad(rows, (0, lacking), value=NOBODY), mesh.world_group)
        values = gather(torch.nn.functional.pad(values, (0, 0, 0, lacking)), mesh.world_group)
    drawn = np.random.default_rng(seed).integers(0, batch.total, count)
    return values[rows.argsort()[torch.from_numpy(drawn).to(rows.device)]]


@torch.no_grad()
def better_latents(
    latents: Tensor, squared: Tensor, tried: Tensor, squared_tried: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """(which particles jump [B], to latents [B, L]), of those `tried` [K, L].

    What counts is ½ |I - CTF · P|² + λ_z |z|² in nats: of residuals `squared` [B] at the particles' own latents [B, L],
    `squared_tried` [K, B] at the others, and λ_z = `weight`.
    """
    own = 0.5 * squared + weight * latents.square().sum(1)
    cheapest, which = (0.5 * squared_tried + weight * tried.square().sum(1, keepdim=True)).min(dim=0)
    return cheapest < own, tried[which]
