"""A latent table whose rows travel: after any number of steps on any number of ranks, what a table that stays has."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spire_dist.data.order import NOTHING, Order
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.latent_table import BETAS, LatentTable, at_home

COUNT, LATENT, RATE = 1061, 3, 0.1
ORDER = Order(COUNT, 8, 24, seed=5)
"""Blocks of 504 images, 21 steps each; 45 steps an epoch, the last one short."""
CPU = torch.device("cpu")


def _start() -> tuple[Tensor, Tensor]:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((2, COUNT, LATENT)).astype(np.float32))
    return values[0], values[1]


def _loss(latents: Tensor, rows: Tensor) -> Tensor:
    """Pulls the latents of some particles towards the targets of their own."""
    return (latents - _start()[1][rows]).square().sum()


def _alone(steps: int) -> Tensor:
    """torch's own table and optimiser."""
    table = nn.Embedding.from_pretrained(_start()[0].clone(), freeze=False, sparse=True)
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=RATE, betas=BETAS)
    for step in range(steps):
        rows = torch.from_numpy(ORDER.rows(step)[ORDER.rows(step) != NOTHING])
        optimiser.zero_grad()
        _loss(table(rows), rows).backward()
        optimiser.step()
    return table.weight.detach()


def _own_home(mesh: Mesh, values: Tensor) -> Tensor:
    run = -(-len(values) // mesh.world)
    return at_home(values[mesh.rank * run : (mesh.rank + 1) * run])


def _together(mesh: Mesh, steps: int, home_every: int) -> Tensor:
    """`steps` of training; rows come home with every block, and in between every `home_every` steps, as for a save."""
    table = LatentTable(_own_home(mesh, _start()[0]), ORDER, mesh, CPU)
    for step in range(steps):
        if step % home_every == 0:
            table.come_home()
        table.visit(step)
        rows = ORDER.rows(step, mesh.rank, mesh.world)
        rows = torch.from_numpy(rows[rows != NOTHING])
        (mesh.world * _loss(table(rows), rows)).backward()  # the mean over ranks is the sum of their losses
        table.descend(RATE)
    table.come_home()
    return table.home[:, 0]


@pytest.mark.parametrize("home_every", [1000, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_that_travelled_have_the_bits_of_those_that_stayed(ranks, world, home_every):
    steps = 2 * ORDER.steps_per_epoch + 17
    found = ranks(_together, world, 1, steps, home_every)
    if world == 3:  # no power of two: three times a gradient, divided by 3, is not always the same
        torch.testing.assert_close(torch.cat(found), _alone(steps), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(torch.cat(found), _alone(steps))
    assert [len(rank) for rank in found] == [len(run) for run in torch.arange(COUNT).chunk(world)]


def test_a_table_that_goes_on_from_home_is_the_same():
    table = LatentTable(at_home(_start()[0]), ORDER, Mesh(), CPU)
    for step in range(60):
        if step == 30:
            table = LatentTable(table.home.clone(), ORDER, Mesh(), CPU, table.steps)
        table.visit(step)
        rows = torch.from_numpy(ORDER.rows(step)[ORDER.rows(step) != NOTHING])
        _loss(table(rows), rows).backward()
        table.descend(RATE)
        if step == 29:
            table.come_home()
    table.come_home()
    assert torch.equal(table.home[:, 0], _alone(60))


def test_more_ranks_than_rows_leave_some_without_a_home(ranks):
    found = ranks(_homes_of_two, 3, 1)
    assert [rank.tolist() for rank in found] == [[1.0], [2.0], []]


def _homes_of_two(mesh: Mesh) -> Tensor:
    order = Order(2, 1, 3, seed=0)
    table = LatentTable(_own_home(mesh, torch.tensor([[1.0], [2.0]])), order, mesh, CPU)
    table.visit(0)
    assert len(table.here) <= 1
    table.come_home()
    return table.home[:, 0, 0]


def test_rows_outside_the_batch_do_not_move():
    table = LatentTable(at_home(_start()[0]), ORDER, Mesh(), CPU)
    table.visit(0)
    for rows in (table.here[[1, 5, 7]], table.here[[5, 9]]):  # 1 and 7 have momentum in the second step
        before = table.rows.weight.detach().clone()
        _loss(table(rows), rows).backward()
        table.descend(RATE)
        moved = (table.rows.weight.detach() != before).any(dim=1)
        assert torch.equal(table.here[moved[: len(table.here)]], rows)
