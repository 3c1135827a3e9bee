"""The split network against the plain one; rotations from six numbers."""

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from spire_dist.model.deformation import PairNetwork, rotations_from_6d


def filled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_split_network_is_the_plain_network_of_joined_pairs(layers):
    network = filled(PairNetwork(3, 5, 16, layers, 4, bias=1.0))
    first = nn.Linear(8, 16, dtype=torch.float64)
    first.weight.data = torch.cat([network.from_latent.weight, network.from_feature.weight], dim=1)
    first.bias.data = network.from_latent.bias
    plain = nn.Sequential(first, nn.ReLU(), *(module for layer in network.middle for module in (layer, nn.ReLU())))
    plain.append(network.last)
    z, f = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    pairs = torch.cat([z[:, None].expand(6, 7, 3), f[None].expand(6, 7, 5)], dim=-1)
    torch.testing.assert_close(network(z, f), plain(pairs), rtol=1e-12, atol=1e-12)


def test_the_output_starts_at_its_bias_for_every_pair():
    network = PairNetwork(2, 3, 8, 2, 4, bias=2.0)
    assert torch.equal(network(torch.randn(5, 2), torch.randn(6, 3)), torch.full((5, 6, 4), 2.0))


def test_zeros_are_the_identity():
    assert torch.equal(rotations_from_6d(torch.zeros(2, 3, 6)), torch.eye(3).expand(2, 3, 3, 3))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_any_six_numbers_give_a_rotation(scale):
    generator = torch.Generator().manual_seed(1)
    matrices = rotations_from_6d(scale * torch.randn(500, 6, generator=generator, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64).expand(500, 3, 3)
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(500, dtype=torch.float64), rtol=0, atol=1e-9)


def test_every_rotation_can_be_reached():
    wanted = torch.from_numpy(Rotation.random(50, random_state=0).as_matrix())
    numbers = torch.cat([wanted[..., 0], wanted[..., 1]], dim=-1) - torch.tensor([1.0, 0, 0, 0, 1, 0])
    torch.testing.assert_close(rotations_from_6d(numbers), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["zero", "half turn", "parallel columns"])
def test_gradients_are_finite_at_the_start_and_where_the_columns_degenerate(start):
    numbers = torch.zeros(4, 6)
    if start == "half turn":
        numbers[:, 0], numbers[:, 4] = -2.0, -2.0
    if start == "parallel columns":
        numbers[:, 3:] = torch.tensor([1.0, -1.0, 0.0])
    numbers.requires_grad_()
    (rotations_from_6d(numbers) * torch.randn(4, 3, 3)).sum().backward()
    assert numbers.grad is not None
    assert torch.isfinite(numbers.grad).all()
