"""Latents tried by ranks are those that one process tries."""

import pytest
import torch

from spire_dist.data.loader import Batch
from spire_dist.distributed.mesh import Mesh
from spire_dist.training.jumps import drawn_latents
from tests.distributed.conftest import Ranks

pytestmark = pytest.mark.ranks


def _batch(rows: list[int], total: int) -> Batch:
    """Particles of which nothing but their rows counts."""
    zeros = torch.zeros(len(rows), 4, 3)
    return Batch(torch.tensor(rows, dtype=torch.long), zeros + 0j, zeros, zeros, zeros[:, 0, :2], total)


def _drawn_of(mesh: Mesh, rows: list[int], latents: torch.Tensor) -> torch.Tensor:
    share = slice(2 * mesh.rank, 2 * mesh.rank + 2)  # of five particles the last rank of three has one
    return drawn_latents(mesh, _batch(rows[share], len(rows)), latents[share], 2, 8, (3, 2, 1))


def test_ranks_try_what_one_process_tries(ranks: Ranks):
    rows = [9, 2, 4, 8, 6]
    latents = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = drawn_latents(Mesh(), _batch(rows, 5), latents, 5, 8, (3, 2, 1))
    assert all(torch.equal(found, expected) for found in ranks(_drawn_of, 3, 1, rows, latents))
