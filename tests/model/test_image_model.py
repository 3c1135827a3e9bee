"""From Gaussians to the loss: Parseval against real-space sums, gradients against finite differences."""

import numpy as np
import pytest
import torch

from spire_dist.config import HierarchyConfig, StageConfig
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.image_model import render, squared_residuals
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture
from spire_dist.physics.ctf import contrast_transfer, frequency_grid
from spire_dist.physics.poses import random_rotations


@pytest.mark.parametrize("box", [8, 9, 15, 16])
def test_residuals_are_the_real_space_sum_of_squares(box):
    model, images = torch.randn(2, 5, box, box, dtype=torch.float64)
    found = squared_residuals(model, torch.ones(5, box, box // 2 + 1, dtype=torch.float64), torch.fft.rfft2(images))
    torch.testing.assert_close(found, ((model - images) ** 2).sum((1, 2)), rtol=1e-12, atol=0)


def scene(box: int, hierarchical: bool):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gaussians = Gaussians(2 * normal(5, 3), 1 + 0.2 * normal(5).abs(), 0.5 * normal(5, 3), unit=1.3)
    if hierarchical:
        config = HierarchyConfig(hidden=4, layers=1, anchor_hidden=4, anchor_layers=1)
        anchor_of = torch.tensor([0, 0, 1, 1, 1])
        mixture = HierarchicalMixture(gaussians, anchor_of, normal(2, 3), normal(2, 3), 2, config)
    else:
        mixture = CoarseMixture(gaussians, 2, StageConfig(hidden=4, layers=1))
    mixture = mixture.double()
    for parameter in mixture.parameters():
        parameter.data += 0.2 * normal(*parameter.shape)
    ctf = torch.tensor([[12000.0, 11000, 30, 300, 2.7, 0.1, 0, 50, 1], [15000, 15500, 80, 300, 2.7, 0.1, 0, 0, 1]])
    factors = contrast_transfer(ctf.double(), *(g.double() for g in frequency_grid(box, 4.0)))
    poses = torch.from_numpy(random_rotations(2, seed=1)).double()
    images = torch.fft.rfft2(normal(2, box, box))
    return mixture, normal(2, 2), poses, normal(2, 2), factors, images


@pytest.mark.parametrize("box", [12, 13])
@pytest.mark.parametrize("hierarchical", [False, True])
def test_gradients_of_the_loss_are_finite_differences(box, hierarchical):
    mixture, latents, rotations, shifts, ctf, images = scene(box, hierarchical)
    own = mixture.gaussians
    learned = [latents.requires_grad_(), own.offsets, own.log_widths, own.amplitudes, own.features]
    learned += [mixture.shift.from_latent.weight, mixture.occupancy.last.weight]
    if isinstance(mixture, HierarchicalMixture):
        learned += [mixture.anchor_centres, mixture.anchor_features, mixture.motion.last.weight]

    def loss() -> torch.Tensor:
        projections = render(mixture, latents, rotations, shifts, box, 4.0)
        return squared_residuals(projections, ctf, images).sum() + mixture.regulariser()

    gradients = torch.autograd.grad(loss(), learned)
    step, rng = 1e-6, np.random.default_rng(0)
    for values, gradient in zip(learned, gradients, strict=True):
        flat = values.detach().view(-1)  # the same memory
        for index in rng.permutation(flat.numel())[:8]:
            with torch.no_grad():
                flat[index] += step
                above = loss().item()
                flat[index] -= 2 * step
                below = loss().item()
                flat[index] += step
            expected = (above - below) / (2 * step)
            assert gradient.flatten()[index].item() == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_the_shift_moves_the_image():
    mixture, latents, rotations, shifts, _, _ = scene(12, hierarchical=False)
    plain = render(mixture, latents, rotations, shifts, 12, 4.0)
    moved = render(mixture, latents, rotations, shifts + torch.tensor([1.0, 0]), 12, 4.0)
    torch.testing.assert_close(moved[:, :, 1:], plain[:, :, :-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("box", [8, 9])
def test_residuals_apply_the_ctf_and_have_the_gradient_of_plain_autograd(box):
    """Without astigmatism, whose CTF at the highest frequency of an even box is not that of a real image."""
    generator = torch.Generator().manual_seed(3)
    model, images, weights = (torch.randn(4, box, box, generator=generator, dtype=torch.float64) for _ in range(3))
    parameters = torch.tensor([[12000.0, 12000, 0, 300, 2.7, 0.1, 0, 50, 1]], dtype=torch.float64).expand(4, -1)
    ctf = contrast_transfer(parameters, *(g.double() for g in frequency_grid(box, 4.0)))
    model.requires_grad_()
    found = squared_residuals(model, ctf, torch.fft.rfft2(images))
    expected = (torch.fft.irfft2(ctf * torch.fft.rfft2(model), s=(box, box)) - images).square().sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    shares = weights[:, 0, 0]
    gradients = [torch.autograd.grad((shares * squares).sum(), model)[0] for squares in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
