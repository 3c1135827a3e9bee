"""Gaussians on several ranks give what one process gives: images, every gradient and their norm; each with real processes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spire_dist.config import HierarchyConfig, RunConfig, StageConfig
from spire_dist.distributed.collectives import gather, scatter_sum, sum_over, sum_to_first
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.image_model import squared_residuals
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture, Mixture
from spire_dist.model.sharing import (
    gradient_norm,
    own_share,
    placement,
    reduce_common,
    reduce_shared,
    render_shared,
    share,
)
from spire_dist.training.objective import Objective
from spire_dist.training.optimiser import split

MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
"""(replicate, gauss)"""
COUNT, LATENT, FEATURES, ANCHORS, BOX, IMAGES = 203, 3, 5, 7, 16, 12
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def _mixture(kind: str, dtype: torch.dtype) -> Mixture:
    """A mixture in which nothing is zero that has a gradient."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    gaussians = Gaussians(
        torch.from_numpy(rng.normal(0, 3, (COUNT, 3))).float(),
        torch.from_numpy(rng.uniform(0.8, 2, COUNT)).float(),
        torch.from_numpy(rng.normal(0, 1, (COUNT, FEATURES))).float(),
        unit=0.1,
    )
    if kind == "coarse":
        mixture: Mixture = CoarseMixture(gaussians, LATENT, StageConfig(hidden=8, layers=2))
    else:
        anchor_of = torch.from_numpy(np.sort(rng.integers(0, ANCHORS, COUNT)))
        centres, features = rng.normal(0, 3, (ANCHORS, 3)), rng.normal(0, 1, (ANCHORS, FEATURES))
        mixture = HierarchicalMixture(
            gaussians, anchor_of, torch.from_numpy(centres).float(), torch.from_numpy(features).float(), LATENT,
            HierarchyConfig(hidden=8, layers=2, anchor_hidden=8, anchor_layers=2),
        )  # fmt: skip
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter += 0.1 * torch.from_numpy(rng.standard_normal(parameter.shape)).float()
    return mixture.to(dtype)


def _particles(dtype: torch.dtype) -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    rotations, _ = np.linalg.qr(rng.standard_normal((IMAGES, 3, 3)))
    images = {
        "latents": rng.standard_normal((IMAGES, LATENT)),
        "rotations": rotations,
        "shifts": rng.normal(0, 1, (IMAGES, 2)),
        "ctf": rng.standard_normal((IMAGES, BOX, BOX // 2 + 1)),
    }
    found = {name: torch.from_numpy(values).to(dtype) for name, values in images.items()}
    found["observed"] = torch.fft.rfft2(torch.from_numpy(rng.standard_normal((IMAGES, BOX, BOX))).to(dtype))
    return found


def _trained(mesh: Mesh, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Projections and gradients of one step as this rank has them, what it holds of the Gaussians at its rows of the whole."""
    whole, particles = _mixture(kind, dtype), _particles(dtype)
    mixture, size = own_share(whole, mesh), IMAGES // mesh.world
    own = {name: values[mesh.rank * size : (mesh.rank + 1) * size] for name, values in particles.items()}
    latents = own["latents"].requires_grad_()
    projections = render_shared(mesh, mixture, latents, own["rotations"], own["shifts"], BOX, 5.0)
    loss = squared_residuals(projections, own["ctf"], own["observed"]).mean()
    (loss + mesh.gauss * mixture.regulariser()).backward()
    gaussians, common = split(dict(Objective(mixture, None, RunConfig(), 1, 1, mesh).named_parameters()))
    reduce_shared(gaussians.values(), mesh)
    reduce_common(common.values(), mesh)
    rows = share(COUNT, mesh.gauss_rank, mesh.gauss)
    found = {"projections": projections.detach(), "latents": latents.grad / mesh.world, "rows": torch.from_numpy(rows)}
    found |= {name: parameter.grad for name, parameter in mixture.named_parameters()}
    return found | {"norm": gradient_norm(gaussians.values(), common.values(), mesh)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["coarse", "hierarchy"])
@pytest.mark.parametrize(("replicate", "gauss"), MESHES)
def test_any_mesh_gives_what_one_process_gives(ranks, kind, dtype, replicate, gauss):
    expected = _trained(Mesh(), kind, dtype)
    found = ranks(_trained, replicate, gauss, kind, dtype)
    for name, values in expected.items():
        if name == "rows":
            continue
        if name in ("projections", "latents"):  # each rank has its own particles'
            pieces = torch.cat([rank[name] for rank in found])
            _assert_close(pieces, values, dtype, name)
            continue
        for rank in found:
            part = values[rank["rows"]] if name.startswith("gaussians.") else values
            _assert_close(rank[name], part, dtype, name, scale=values)
    sizes = [len(rank["rows"]) for rank in found]
    assert sum(sizes) == replicate * COUNT


def _assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str, scale: Tensor | None = None) -> None:
    scale = expected if scale is None else scale
    assert scale.abs().max() > 1e-6, f"{name} tests nothing"
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * scale.abs().max(), name


@pytest.mark.parametrize("parts", range(1, 9))
@pytest.mark.parametrize("count", [8, 100, 4099])
def test_shares_are_torchs_chunks_and_even_samples(count, parts):
    shares = [share(count, part, parts) for part in range(parts)]
    assert [len(rows) for rows in shares if len(rows)] == [len(chunk) for chunk in torch.arange(count).chunk(parts)]
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(count))
    np.testing.assert_array_equal(np.sort(placement(count)), np.arange(count))
    for rows in shares:
        assert (np.diff(rows) > 0).all()
        in_quarters = np.diff(np.searchsorted(rows, np.linspace(0, count, 5)))
        assert np.abs(in_quarters - len(rows) / 4).max() <= 3


def _exchanged(mesh: Mesh) -> dict[str, Tensor]:
    group = mesh.world_group
    own = torch.arange(6.0).reshape(2, 3) + 10 * mesh.rank
    own.requires_grad_()
    gathered = gather(own, group)
    (gathered * torch.arange(gathered.numel()).view_as(gathered) * (mesh.rank + 1)).sum().backward()
    partial = torch.arange(4.0 * mesh.world).reshape(-1, 2) * (mesh.rank + 1)
    partial.requires_grad_()
    summed = scatter_sum(partial, group)
    (summed * (mesh.rank + 1)).sum().backward()
    several = [torch.full((2,), float(mesh.rank)), torch.full((1, 3), 2.0)]
    sum_over(several, group)
    first = torch.full((2,), 5.0 + mesh.rank)
    sum_to_first(first, group)
    return {
        "gathered": gathered.detach(), "own": own.grad, "summed": summed.detach(), "partial": partial.grad,
        "several": torch.cat([t.flatten() for t in several]), "first": first,
    }  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_and_their_gradients(ranks, world):
    results = [_exchanged(Mesh())] if world == 1 else ranks(_exchanged, world, 1)
    factor = world * (world + 1) // 2  # 1 + 2 + ...
    everything = torch.cat([torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(world)])
    weights = torch.arange(6.0 * world).reshape(-1, 3)
    for rank, found in enumerate(results):
        torch.testing.assert_close(found["gathered"], everything)
        torch.testing.assert_close(found["own"], factor * weights[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(
            found["summed"], factor * torch.arange(4.0 * world).reshape(-1, 2)[2 * rank : 2 * rank + 2]
        )
        torch.testing.assert_close(
            found["partial"], torch.arange(1.0, world + 1).repeat_interleave(2)[:, None].expand(-1, 2)
        )
        assert found["several"].tolist() == [world * (world - 1) / 2] * 2 + [2.0 * world] * 3
    assert results[0]["first"].tolist() == [sum(5.0 + rank for rank in range(world))] * 2
