"""Corrections of poses: rotations as scipy has them, and the loss's gradient against finite differences."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spire_dist.config import HierarchyConfig, PosesConfig, load_config
from spire_dist.data.loader import Batch
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.mixtures import HierarchicalMixture
from spire_dist.model.pose_corrections import corrected, correction_prior, rotations_from_vectors
from spire_dist.physics.ctf import contrast_transfer, frequency_grid
from spire_dist.physics.poses import random_rotations
from spire_dist.physics.projector import project
from spire_dist.training.objective import Objective

ANGLES = st.floats(-2 * np.pi, 2 * np.pi)


@given(st.lists(st.tuples(ANGLES, ANGLES, ANGLES), min_size=1, max_size=4), st.sampled_from([1.0, 1e-3, 1e-9]))
@settings(max_examples=50, deadline=None)
def test_rotation_vectors_are_those_of_scipy(vectors, scale):
    vectors = scale * np.array(vectors)
    found = rotations_from_vectors(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(found, Rotation.from_rotvec(vectors).as_matrix(), atol=1e-12)


def test_a_correction_turns_after_the_pose_and_adds_to_the_shift():
    config, rng = PosesConfig(rate_deg=0.5, rate_px=0.25), np.random.default_rng(0)
    given_rotations, given_shifts = random_rotations(6, seed=0).astype(np.float64), rng.normal(size=(6, 2))
    degrees, pixels = rng.normal(0, 5, (6, 3)), rng.normal(0, 2, (6, 2))
    numbers = torch.from_numpy(np.hstack([degrees / 0.5, pixels / 0.25]))
    rotations, shifts = corrected(torch.from_numpy(given_rotations), torch.from_numpy(given_shifts), numbers, config)
    expected = Rotation.from_rotvec(degrees, degrees=True) * Rotation.from_matrix(given_rotations)
    np.testing.assert_allclose(rotations.numpy(), expected.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(shifts.numpy(), given_shifts + pixels, atol=1e-12)


def test_the_third_number_turns_the_image_itself():
    """By a right angle, from x towards y, in an odd box, whose middle pixel is its middle."""
    config = PosesConfig(rate_deg=1)
    centres, pose = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(random_rotations(1, 3))
    turned, shifts = corrected(pose, torch.zeros(1, 2), torch.tensor([[0.0, 0, 90, 0, 0]]), config)
    plain, found = (
        project(3 * centres, torch.ones(20), torch.ones(20), r, shifts, 33, 1.0, backend="torch")[0]
        for r in (pose, turned)
    )
    torch.testing.assert_close(found, torch.rot90(plain, -1, (0, 1)), rtol=0, atol=1e-4)


def test_the_prior_is_that_of_independent_normal_errors():
    config = PosesConfig(rate_deg=0.5, rate_px=0.25, prior_deg=3, prior_px=2)
    numbers = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = numbers * torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25])
    normal = torch.distributions.Normal(0, torch.tensor([3, 3, 3, 2, 2], dtype=torch.float64))
    expected = (normal.log_prob(torch.zeros(5)) - normal.log_prob(errors)).sum(1)
    torch.testing.assert_close(correction_prior(numbers, config), expected)


@pytest.fixture(scope="module")
def problem() -> SimpleNamespace:
    """A stage 2 of a few Gaussians and three images in float64, as the loss sees them."""
    generator, box = torch.Generator().manual_seed(2), 14

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = load_config(overrides=["projector='torch'", "poses.refine=true", "poses.rate_deg=3", "poses.rate_px=0.5"])
    gaussians = Gaussians(2 * normal(5, 3), 1 + 0.2 * normal(5).abs(), 0.5 * normal(5, 3), unit=1.3)
    networks = HierarchyConfig(hidden=4, layers=1, anchor_hidden=4, anchor_layers=1)
    mixture = HierarchicalMixture(gaussians, torch.tensor([0, 0, 1, 1, 1]), normal(2, 3), normal(2, 3), 2, networks)
    for parameter in mixture.double().parameters():
        parameter.data += 0.2 * normal(*parameter.shape)
    ctf = torch.tensor([[12000.0, 11000, 30, 300, 2.7, 0.1, 0, 50, 1]] * 3).double()
    batch = Batch(
        rows=torch.arange(3), images=torch.fft.rfft2(normal(3, box, box)),
        ctf=contrast_transfer(ctf, *(g.double() for g in frequency_grid(box, 4.0))),
        rotations=torch.from_numpy(random_rotations(3, seed=1)).double(), shifts_px=normal(3, 2), total=3,
    )  # fmt: skip
    return SimpleNamespace(
        objective=Objective(mixture, None, config, 2, 3, Mesh()),
        batch=batch,
        latents=normal(3, 2),
        numbers=normal(3, 5),
    )


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_gradient_of_the_loss_is_that_of_finite_differences(problem, scale):
    """Also where the correction is zero, where every particle begins."""

    def loss(numbers):
        return problem.objective(problem.batch, problem.latents, False, numbers)[0]

    assert torch.autograd.gradcheck(loss, (scale * problem.numbers).requires_grad_(), eps=1e-6, atol=1e-5, rtol=1e-5)


def test_corrections_of_zero_leave_the_loss_as_it_is(problem):
    plain = problem.objective(problem.batch, problem.latents, False)
    found = problem.objective(problem.batch, problem.latents, False, torch.zeros(3, 5, dtype=torch.float64))
    for value, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
