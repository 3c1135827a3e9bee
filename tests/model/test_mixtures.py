"""The two models against the paper's equations, one Gaussian at a time in float64."""

import numpy as np
import pytest
import torch

from spire_dist.config import HierarchyConfig, StageConfig
from spire_dist.model.gaussians import Gaussians, draw_centres, position_features
from spire_dist.model.mixtures import ANCHOR_MOTION_PX, CoarseMixture, HierarchicalMixture, Mixture

LATENT, FEATURES, COUNT = 2, 4, 9


def filled(mixture: Mixture) -> Mixture:
    """Random values everywhere (the last layers start at zero, which would hide mistakes), in float64."""
    generator = torch.Generator().manual_seed(4)
    mixture = mixture.double()
    for parameter in mixture.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixture


def gaussians() -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    points, features = torch.randn(COUNT, 3, generator=generator), torch.randn(COUNT, FEATURES, generator=generator)
    return Gaussians(4 * points, torch.linspace(0.8, 1.6, COUNT), features, unit=2.5)


@pytest.fixture
def coarse():
    return filled(CoarseMixture(gaussians(), LATENT, StageConfig(hidden=8, layers=2, motion_px=3.0)))


@pytest.fixture
def hierarchy():
    anchor_of = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])  # anchor 2 has none
    config = HierarchyConfig(hidden=8, layers=2, anchor_hidden=8, anchor_layers=2, motion_px=1.5, feature_weight=0.25)
    centres, features = torch.randn(4, 3) * 5, torch.randn(4, FEATURES)
    return filled(HierarchicalMixture(gaussians(), anchor_of, centres, features, LATENT, config))


def network(net, z, f):
    """A perceptron of the joined pair, written out with numpy."""
    weights = np.concatenate([net.from_latent.weight.detach(), net.from_feature.weight.detach()], axis=1)
    hidden = np.maximum(weights @ np.concatenate([z, f]) + net.from_latent.bias.detach().numpy(), 0)
    for layer in net.middle:
        hidden = np.maximum(layer.weight.detach().numpy() @ hidden + layer.bias.detach().numpy(), 0)
    return net.last.weight.detach().numpy() @ hidden + net.last.bias.detach().numpy()


def gram_schmidt(numbers):
    a, b = numbers[:6].reshape(2, 3) + np.eye(3)[:2]
    x = a / np.sqrt(a @ a)
    y = b - (b @ x) * x
    y = y / np.sqrt(y @ y)
    return np.array([x, y, np.cross(x, y)]).T


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_coarse_model_is_shift_and_occupancy_of_each_gaussian(coarse):
    z = torch.randn(3, LATENT, dtype=torch.float64)
    centres, amplitudes = (t.detach().numpy() for t in coarse.deform(z))
    own = {name: p.detach().numpy() for name, p in coarse.gaussians.named_parameters()}
    for b in range(3):
        for i in range(COUNT):
            f = own["features"][i]
            expected = own["offsets"][i] + 3.0 * network(coarse.shift, z[b].numpy(), f)
            np.testing.assert_allclose(centres[b, i], expected, rtol=1e-10, atol=1e-10)
            share = sigmoid(network(coarse.occupancy, z[b].numpy(), f)[0])
            assert amplitudes[b, i] == pytest.approx(2.5 * own["amplitudes"][i] * share, rel=1e-10)


def test_the_hierarchy_is_equations_3_to_6_for_each_gaussian(hierarchy):
    z = torch.randn(3, LATENT, dtype=torch.float64)
    centres, amplitudes = (t.detach().numpy() for t in hierarchy.deform(z))
    own = {name: p.detach().numpy() for name, p in hierarchy.gaussians.named_parameters()}
    anchor_centres, anchor_features = (
        p.detach().numpy() for p in (hierarchy.anchor_centres, hierarchy.anchor_features)
    )
    for b in range(3):
        for i in range(COUNT):
            a = int(hierarchy.anchor_of[i])
            f = anchor_features[a] + own["features"][i]
            numbers = network(hierarchy.motion, z[b].numpy(), anchor_features[a])
            moved = gram_schmidt(numbers) @ own["offsets"][i] + anchor_centres[a] + ANCHOR_MOTION_PX * numbers[6:]
            moved = moved + 1.5 * network(hierarchy.shift, z[b].numpy(), f)
            np.testing.assert_allclose(centres[b, i], moved, rtol=1e-10, atol=1e-10)
            share = sigmoid(network(hierarchy.occupancy, z[b].numpy(), f)[0])
            assert amplitudes[b, i] == pytest.approx(2.5 * own["amplitudes"][i] * share, rel=1e-10)
    own_features = own["features"]
    assert float(hierarchy.regulariser().detach()) == pytest.approx(0.25 * (own_features**2).sum(), rel=1e-12)


def test_rigid_parts_keep_the_distances_within_a_part(hierarchy):
    z = torch.randn(5, LATENT, dtype=torch.float64)
    centres = hierarchy.rigid_centres(z).detach()
    offsets = hierarchy.gaussians.offsets.detach()
    for part in (slice(0, 3), slice(3, 5), slice(5, 9)):
        distances = torch.cdist(centres[:, part], centres[:, part])
        expected = torch.cdist(offsets[part], offsets[part]).expand_as(distances)
        torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-7)


def test_fixed_features_do_not_learn_and_are_not_penalised():
    own = gaussians()
    fixed = Gaussians(own.offsets.detach(), own.widths_px().detach(), own.features.detach(), fixed_features=True)
    anchor_of, centres = torch.zeros(COUNT, dtype=torch.long), torch.randn(1, 3)
    config = HierarchyConfig(hidden=8, anchor_hidden=8, feature_weight=0.25)
    mixture = HierarchicalMixture(fixed, anchor_of, centres, torch.randn(1, FEATURES), LATENT, config)
    assert not [name for name, _ in mixture.named_parameters() if "features" in name]
    assert {"gaussians.features", "anchor_features"} <= mixture.state_dict().keys()
    assert float(mixture.regulariser()) == 0
    torch.testing.assert_close(mixture.features(), mixture.anchor_features + own.features.detach())


def test_features_of_a_position_are_sines_and_cosines_of_its_octaves():
    points = torch.tensor([[8.0, 0.0, -4.0]])  # in a box of 32: p = 1/2, 0, -1/4
    found = position_features(points, 32, 14)[0]
    angles = np.pi * np.array([0.5, 0.0, -0.25])
    expected = [[np.sin(a), np.sin(2 * a), np.cos(a), np.cos(2 * a)] for a in angles]
    np.testing.assert_allclose(found, [*np.ravel(expected), 0, 0], atol=1e-6)


def test_gaussians_that_are_not_sorted_by_anchor_are_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="sorted"):
        HierarchicalMixture(
            gaussians(), torch.arange(COUNT).flip(0), torch.zeros(COUNT, 3), torch.zeros(COUNT, FEATURES), LATENT,
            HierarchyConfig(),
        )  # fmt: skip


def test_centres_are_drawn_where_the_density_is_and_in_proportion_to_it():
    volume = np.zeros((16, 16, 16), dtype=np.float32)
    volume[3, 8, 12], volume[10, 2, 6] = 3.0, 1.0  # [z, y, x]
    volume[0] = 0.1  # below 5 % of the peak
    points = draw_centres(volume, 4000, np.random.default_rng(0))
    first = np.abs(points - (np.array([12, 8, 3]) - 8)).max(axis=1) <= 0.5
    second = np.abs(points - (np.array([6, 2, 10]) - 8)).max(axis=1) <= 0.5
    assert first.sum() == pytest.approx(3000, abs=2)
    assert (first | second).all()
