"""Latents of the linear model by ranks are those of one process."""

from pathlib import Path

import numpy as np
import pytest

from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.mesh import Mesh
from spire_dist.training.linear import linear_latents
from tests.distributed.conftest import Ranks

pytestmark = pytest.mark.ranks


def _latents(mesh: Mesh, store: Path) -> np.ndarray:
    return linear_latents(BatchSource(ParticleStore.open(store)), 2, 0, mesh)


def test_ranks_fit_what_one_process_fits(ranks: Ranks, tiny_store: Path):
    alone = _latents(Mesh(), tiny_store)
    found = ranks(_latents, 3, 1, tiny_store)
    assert all(np.array_equal(found[0], other) for other in found)
    np.testing.assert_allclose(found[0], alone, atol=1e-3)
