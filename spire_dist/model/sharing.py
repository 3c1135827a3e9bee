"""Gaussians shared among the ranks of a gauss group: who holds which, the image they make together, and their gradients.

Every rank renders its own Gaussians for all images of its group; the partial images are summed and each rank keeps those of
its own particles. Networks, anchors and encoder are on every rank.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spire_dist.distributed.collectives import Group, gather, scatter_sum, sum_over
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.image_model import render
from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import Backend, project

GOLDEN = (5**0.5 - 1) / 2


def placement(count: int) -> NDArray[np.int64]:
    """A fixed order of `count` Gaussians any run of which is an even sample of them all.

    Gaussians lie sorted (by place, by anchor), and neighbours are alike in width, so runs of that order would not share
    the work evenly. Here the i-th comes at the place of the fraction of i times the golden ratio, a sequence that fills
    every interval evenly.
    """
    return np.argsort((np.arange(count) * GOLDEN) % 1.0, kind="stable")


def share(count: int, part: int, parts: int) -> NDArray[np.int64]:
    """The Gaussians (ascending) that number `part` of `parts` ranks holds: as many as `torch.chunk` would give it."""
    size = -(-count // parts)
    return np.sort(placement(count)[part * size : (part + 1) * size])


def own_share(mixture: Mixture, mesh: Mesh) -> Mixture:
    """A rank's part of a whole mixture: its Gaussians; networks and anchors are those of `mixture` themselves.

    One process alone keeps the mixture as it is.
    """
    if mesh.gauss == 1:
        return mixture
    whole = mixture.gaussians
    mine = torch.from_numpy(share(len(whole.offsets), mesh.gauss_rank, mesh.gauss)).to(whole.offsets.device)
    rows = {name: values[mine] for name, values in whole.state_dict().items() if values.ndim}
    fixed = not isinstance(whole.features, nn.Parameter)
    part = Gaussians(rows["offsets"], rows["log_widths"].exp(), rows["features"], fixed_features=fixed)
    part.load_state_dict(whole.state_dict() | rows)  # widths to the last bit, amplitudes and their unit
    return mixture.with_gaussians(part.to(whole.offsets), mine)


def render_shared(
    mesh: Mesh,
    mixture: Mixture,
    latents: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    box: int,
    cut: float,
    backend: Backend = "auto",
) -> Tensor:
    """Projections [B, box, box] of a rank's own B particles, made by all Gaussians of its group.

    As `image_model.render`, with B the same on every rank of the group.
    """
    group = mesh.gauss_group
    all_latents = gather(latents, group)
    all_rotations, all_shifts = gather(torch.cat([rotations.flatten(1), shifts_px], dim=1), group).split([9, 2], dim=1)
    partial = render(mixture, all_latents, all_rotations.reshape(-1, 3, 3), all_shifts, box, cut, backend)
    return scatter_sum(partial, group)


def render_each(
    mesh: Mesh,
    mixture: Mixture,
    latents: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    box: int,
    cut: float,
    backend: Backend = "auto",
) -> Iterator[Tensor]:
    """For each of `latents` [K, L], the same on all ranks: projections [B, box, box] of that molecule in a rank's B poses."""
    group = mesh.gauss_group
    poses = gather(torch.cat([rotations.flatten(1), shifts_px], dim=1), group)
    all_rotations, all_shifts = poses[:, :9].reshape(-1, 3, 3), poses[:, 9:]
    widths = mixture.gaussians.widths_px()
    for centres, amplitudes in zip(*mixture.deform(latents), strict=True):
        yield scatter_sum(
            project(centres, amplitudes, widths, all_rotations, all_shifts, box, 1.0, cut, backend), group
        )


def reduce_shared(gaussians: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """From the gradients of this group's images to those of the mean over ranks, in place, of a rank's own Gaussians."""
    _reduce(gaussians, mesh.replicate_group, mesh.world)


def reduce_common(common: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """The same of what every rank has: networks and anchors have the gradients of its Gaussians, an encoder of its images.

    (A table's rows, which belong to one rank alone, are only divided.)
    """
    _reduce(common, mesh.world_group, mesh.world)


def gradient_norm(gaussians: Iterable[nn.Parameter], common: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """Norm of the reduced gradient of the whole model: every Gaussian and every other parameter counted once."""
    squares = _square(gaussians)
    sum_over([squares], mesh.gauss_group)
    return (squares + _square(common)).sqrt()


def _reduce(parameters: Iterable[nn.Parameter], group: Group, world: int) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sum_over(gradients, group)
    if world > 1:
        for gradient in gradients:
            gradient /= world


def _square(parameters: Iterable[nn.Parameter]) -> Tensor:
    return torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum()
