"""The split network against the plain one; rotations from six numbers."""

import numba
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from spire_dist.model import deformation
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
    network = PairNetwork(2, 3, 8, 2, 4, bias=2.0, gain=1.5)
    assert torch.equal(network(torch.randn(5, 2), torch.randn(6, 3)), torch.full((5, 6, 4), 3.0))


def outputs_and_gradients(network: PairNetwork, latents, features, upstream):
    """The outputs, then the gradients of both inputs and of every parameter."""
    leaves = [latents.clone().requires_grad_(), features.clone().requires_grad_()]
    outputs = network(*leaves)
    return [outputs.detach(), *torch.autograd.grad(outputs, [*leaves, *network.parameters()], upstream)]


def pairs(batch: int, count: int, hidden: int, layers: int, outputs: int):
    network = filled(PairNetwork(3, 5, hidden, layers, outputs))
    generator = torch.Generator().manual_seed(1)
    sizes = (batch, 3), (count, 5), (batch, count, outputs)
    return network, [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


# Sizes that fill whole tiles, blocks and vectors, and sizes that do not; fewer hidden units than outputs.
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 256, 32, 1, 3),
        (3, 130, 30, 2, 1),
        (2, 300, 9, 3, 9),
        (70, 64, 8, 2, 4),
        (1, 900, 5, 1, 1),
        (3, 300, 4, 2, 9),
        (2, 128, 2, 2, 5),
        (2, 128, 4, 3, 9),
    ],
)
def test_the_kernel_is_the_network_in_double_precision(sizes):
    network, inputs = pairs(*sizes)
    expected = outputs_and_gradients(network, *inputs)
    found = outputs_and_gradients(network.float(), *(t.float() for t in inputs))
    for mine, reference in zip(found, expected, strict=True):
        assert (mine - reference).norm() < 3e-6 * reference.norm()


def test_the_kernel_gives_the_same_bits_on_one_and_two_threads():
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba was started with one thread")
    network, inputs = pairs(5, 700, 24, 2, 3)
    before, results = numba.get_num_threads(), []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(outputs_and_gradients(network.float(), *(t.float() for t in inputs)))
    numba.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("layers", [1, 3])
def test_chunks_of_gaussians_change_nothing(layers, monkeypatch):
    network, inputs = pairs(4, 50, 8, layers, 3)
    whole = outputs_and_gradients(network, *inputs)
    monkeypatch.setattr(deformation, "CHUNK_BYTES", 7 * 4 * 8 * 8)  # seven Gaussians
    for mine, reference in zip(outputs_and_gradients(network, *inputs), whole, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_as_large_as_the_hidden_layers_is_kept_for_the_backward_pass(dtype, monkeypatch):
    monkeypatch.setattr(deformation, "CHUNK_BYTES", 2**12)
    network, inputs = pairs(4, 256, 64, 2, 3)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.to(dtype)(*(t.to(dtype) for t in inputs[:2]))
    assert kept
    assert max(kept) <= 256 * 64  # the Gaussians' half of the first layer; hidden layers would hold 4 times that


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
