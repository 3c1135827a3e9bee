"""A latent table whose rows travel: after any number of steps on any number of ranks, the bits of one process's table."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spire_dist.data.order import NOTHING, Order
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.latents import LatentTable
from spire_dist.model.travelling import TravellingTable

COUNT, LATENT = 1061, 3
ORDER = Order(COUNT, 8, 24, seed=5)
"""Blocks of 504 images, 21 steps each; 45 steps an epoch, the last one short."""
NO_IMAGE = torch.empty(0)


def _start() -> tuple[Tensor, Tensor]:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((2, COUNT, LATENT)).astype(np.float32))
    return values[0], values[1]


def _step(table: LatentTable | TravellingTable, optimiser: torch.optim.Optimizer, rows: np.ndarray) -> None:
    """Pull the latents of some particles towards the targets of their own."""
    there = torch.from_numpy(rows[rows != NOTHING])
    distance = table(there, NO_IMAGE, NO_IMAGE, NO_IMAGE, NO_IMAGE) - _start()[1][there]
    optimiser.zero_grad()
    distance.square().sum().backward()
    optimiser.step()


def _alone(steps: int) -> Tensor:
    table = LatentTable(_start()[0])
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    for step in range(steps):
        _step(table, optimiser, ORDER.rows(step))
    return table.rows.weight.detach()


def _together(mesh: Mesh, steps: int, home_every: int) -> dict[str, Tensor]:
    """`steps` of training; rows come home with every block, and in between every `home_every` steps, as for a save."""
    portions = -(-ORDER.block_images // mesh.world)
    table = TravellingTable(_start()[0], mesh, portions)
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    for step in range(steps):
        block = ORDER.block_of(step)
        portion = ORDER.portion(block, mesh.rank, mesh.world)
        if step == portion.first_step or step % home_every == 0:
            table.come_home(optimiser)
            everyones = [ORDER.portion(block, rank, mesh.world).rows for rank in range(mesh.world)]
            table.set_out(optimiser, [rows[rows != NOTHING] for rows in everyones])
        _step(table, optimiser, portion.rows[step - portion.first_step])
    table.come_home(optimiser)
    return {"values": table.home[:, 0], "here": torch.tensor(len(table.home))}


@pytest.mark.parametrize("home_every", [1000, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_that_travelled_have_the_bits_of_those_that_stayed(ranks, world, home_every):
    steps = 2 * ORDER.steps_per_epoch + 17
    found = ranks(_together, world, 1, steps, home_every)
    assert torch.equal(torch.cat([rank["values"] for rank in found]), _alone(steps))
    assert [int(rank["here"]) for rank in found] == [len(run) for run in torch.arange(COUNT).chunk(world)]


def test_more_ranks_than_rows_leave_some_without_a_home(ranks):
    found = ranks(_homes_of_two, 3, 1)
    assert [rank.tolist() for rank in found] == [[1.0], [2.0], []]


def _homes_of_two(mesh: Mesh) -> Tensor:
    table = TravellingTable(torch.tensor([[1.0], [2.0]]), mesh, 2)
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    table.set_out(optimiser, [np.array([1]), np.array([], dtype=int), np.array([0])])
    table.come_home(optimiser)
    return table.home[:, 0, 0]


def test_a_block_does_not_begin_before_the_last_has_ended():
    table = TravellingTable(_start()[0], Mesh(), 10)
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    table.set_out(optimiser, [np.arange(10)])
    with pytest.raises(AssertionError, match="come home"):
        table.set_out(optimiser, [np.arange(10)])
