"""The projector: its fast path against the float64 reference, the reference against mathematics."""

import math

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_dist.errors import ConfigError
from spire_dist.physics.poses import random_rotations
from spire_dist.physics.projector import choose_backend, project, render_volume

PIXEL = 2.5
# Relative L2 errors of the image and of the gradients of centre, amplitude and width that the cut may cost. An image cut
# sharply at c σ in x and in y would be off by √(2 erfc(c)), 1.8e-4 at 4 σ; windows end half a pixel further out.
BUDGETS = {4.0: (1e-4, 5e-4, 1e-4, 1e-3), 5.0: (1e-6, 1e-5, 1e-5, 1e-5)}


def scene(count=200, batch=3, seed=0, box=64, per_image=True, dtype=torch.float64):
    """Centres, amplitudes, widths (1 to 2 px), rotations, shifts of Gaussians in a ball of 0.36 boxes."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, 3))
    radii = 0.36 * box * PIXEL * rng.uniform(size=(count, 1)) ** (1 / 3)
    centres = directions / np.linalg.norm(directions, axis=1, keepdims=True) * radii
    amplitudes = rng.uniform(0.2, 1.0, count)
    if per_image:
        centres = centres + rng.normal(size=(batch, count, 3))
        amplitudes = amplitudes * rng.uniform(0.5, 1, (batch, count))
    widths = rng.uniform(1, 2, count) * PIXEL
    arrays = (centres, amplitudes, widths, random_rotations(batch, seed), rng.uniform(-9, 9, (batch, 2)))
    return [torch.from_numpy(np.asarray(a)).to(dtype) for a in arrays]


def image_and_gradients(arrays, upstream, **options):
    centres, amplitudes, widths, *pose = arrays
    leaves = [t.clone().requires_grad_() for t in (centres, amplitudes, widths)]
    image = project(*leaves, *pose, pixel_size=PIXEL, box=upstream.shape[-1], **options)
    image.backward(upstream.to(image.dtype))
    return [image.detach(), *(t.grad for t in leaves)]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("cut", [4.0, 5.0])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("box", [64, 65])
def test_fast_path_stays_within_its_error_budget(cut, per_image, box):
    reference = scene(box=box, per_image=per_image)
    upstream = torch.randn(3, box, box, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = image_and_gradients(reference, upstream, backend="torch")
    found = image_and_gradients([t.float() for t in reference], upstream, backend="numba", cut=cut)
    errors = [relative(f, e) for f, e in zip(found, expected, strict=True)]
    assert all(error < budget for error, budget in zip(errors, BUDGETS[cut], strict=True)), errors


def test_reference_has_the_right_gradients():
    centres, amplitudes, widths, *pose = scene(count=3, batch=2, box=6)
    leaves = [t.requires_grad_() for t in (centres, amplitudes, widths)]
    assert torch.autograd.gradcheck(lambda *x: project(*x, *pose, box=6, pixel_size=PIXEL), leaves)


def test_one_gaussian_is_the_exact_line_integral():
    """Equation 2 of CryoSPIRE: peak m √(2π) s at the rotated centre plus the shift, whatever its depth."""
    centre, width, amplitude = torch.tensor([[5.0, -10.0, 40.0]]), torch.tensor([6.0]), torch.tensor([0.7])
    turn = torch.tensor([[[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]])  # z of the molecule becomes x of the image
    image = project(centre, amplitude, width, turn, torch.tensor([[5.0, 2.5]]), box=64, pixel_size=PIXEL)[0]
    x, y = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy")
    x, y = (x - 32) * PIXEL - (40 + 5), (y - 32) * PIXEL - (-10 + 2.5)
    expected = 0.7 * math.sqrt(2 * math.pi) * 6 * torch.exp(-(x**2 + y**2) / (2 * 6**2))
    # Beyond 4 σ the local splat is zero where the integral is at most exp(-8) of its peak.
    assert torch.allclose(image, expected, atol=float(expected.max()) * 3.4e-4)
    assert torch.allclose(image[abs(y[:, 0]) < 12][:, abs(x[0]) < 12], expected[abs(y[:, 0]) < 12][:, abs(x[0]) < 12])


@given(quarters=st.integers(0, 3), seed=st.integers(0, 100), backend=st.sampled_from(["torch", "numba"]))
@settings(max_examples=20, deadline=None)
def test_turning_the_molecule_by_quarters_turns_the_image(quarters, seed, backend):
    centres, amplitudes, widths, *_ = scene(count=20, seed=seed, box=33, per_image=False, dtype=torch.float32)
    angle = quarters * math.pi / 2
    turn = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    rotations = torch.stack([torch.eye(3), torch.tensor(turn).round()])
    plain, turned = project(
        centres, amplitudes, widths, rotations, torch.zeros(2, 2), box=33, pixel_size=PIXEL, backend=backend
    )
    # In an odd box the centre is the middle; x towards y is [y, x] indices turned from axis 1 to axis 0.
    assert torch.allclose(turned, torch.rot90(plain, -quarters, (0, 1)), atol=1e-4 * float(plain.max()))


@given(
    dx=st.integers(-4, 4),
    dy=st.integers(-4, 4),
    box=st.sampled_from([40, 41]),
    backend=st.sampled_from(["torch", "numba"]),
)
@settings(max_examples=20, deadline=None)
def test_shift_by_whole_pixels_rolls_the_image(dx, dy, box, backend):
    centres, amplitudes, widths, rotations, _ = scene(count=20, batch=1, box=20, per_image=False, dtype=torch.float32)
    shifts = torch.tensor([[0.0, 0.0], [dx * PIXEL, dy * PIXEL]])
    plain, moved = project(
        centres, amplitudes, widths, rotations.expand(2, 3, 3), shifts, box=box, pixel_size=PIXEL, backend=backend
    )
    assert torch.allclose(moved, torch.roll(plain, (dy, dx), (0, 1)), atol=1e-4 * float(plain.max()))


@given(seed=st.integers(0, 100), box=st.sampled_from([64, 65]), backend=st.sampled_from(["torch", "numba"]))
@settings(max_examples=20, deadline=None)
def test_image_holds_the_mass_of_the_gaussians(seed, box, backend):
    centres, amplitudes, widths, *pose = scene(count=10, seed=seed, box=32, per_image=False, dtype=torch.float32)
    images = project(centres, amplitudes, widths, *pose, box=box, pixel_size=PIXEL, cut=5, backend=backend)
    mass = (amplitudes * (2 * math.pi) ** 1.5 * widths**3).sum()
    assert torch.allclose(images.sum((1, 2)) * PIXEL**2, mass, rtol=1e-4)


@given(seed=st.integers(0, 100), factor=st.floats(-3, 3, width=32), backend=st.sampled_from(["torch", "numba"]))
@settings(max_examples=20, deadline=None)
def test_projection_is_linear_in_the_amplitudes(seed, factor, backend):
    centres, first, widths, *pose = scene(count=10, seed=seed, box=32, per_image=False, dtype=torch.float32)
    second = torch.flip(first, (0,))
    a, b, mixed = (
        project(centres, amplitudes, widths, *pose, box=32, pixel_size=PIXEL, backend=backend)
        for amplitudes in (first, second, first + factor * second)
    )
    assert torch.allclose(mixed, a + factor * b, atol=1e-5 * float((a.abs() + b.abs()).max()) * (1 + abs(factor)))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_gaussians_give_empty_images(backend):
    none = torch.zeros(0, 3), torch.zeros(0), torch.zeros(0)
    images = project(*none, torch.eye(3)[None], torch.zeros(1, 2), box=16, pixel_size=PIXEL, backend=backend)
    assert images.shape == (1, 16, 16)
    assert not images.any()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_images_give_an_empty_batch(backend):
    centres, amplitudes, widths, *_ = scene(count=5, per_image=False, dtype=torch.float32)
    nobody = torch.zeros(0, 3, 3), torch.zeros(0, 2)
    assert project(centres, amplitudes, widths, *nobody, box=16, pixel_size=PIXEL, backend=backend).shape == (0, 16, 16)


def test_gaussians_outside_the_box_leave_nothing_and_get_no_gradient():
    centres = torch.tensor([[0.0, 0, 0], [1000, 0, 0], [0, -1000, 0], [1e9, 1e9, 0]])
    pose = torch.eye(3)[None], torch.zeros(1, 2)
    arrays = [centres, torch.ones(4), torch.full((4,), 5.0), *pose]
    found = image_and_gradients(arrays, torch.ones(1, 32, 32))
    alone = image_and_gradients([a[:1] for a in arrays], torch.ones(1, 32, 32))
    assert torch.equal(found[0], alone[0])
    for gradient in found[1:]:
        assert not gradient[1:].any()


def test_gaussian_at_the_edge_is_cut_by_the_box_as_the_reference_cuts_it():
    arrays = [
        torch.tensor([[-39.0, 36.0, 0]]),
        torch.ones(1),
        torch.tensor([5.0]),
        torch.eye(3)[None],
        torch.zeros(1, 2),
    ]
    upstream = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = image_and_gradients([a.double() for a in arrays], upstream)
    found = image_and_gradients(arrays, upstream, cut=6.0)
    assert all(relative(f, e) < 1e-5 for f, e in zip(found, expected, strict=True) if e.any())


@pytest.mark.parametrize(("count", "batch", "per_image"), [(200, 3, True), (9000, 2, True), (3000, 5, False)])
def test_result_has_the_same_bits_on_one_and_two_threads(count, batch, per_image):
    """With a task for every image, and with the Gaussians of few images divided."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba was started with one thread")
    arrays = scene(count=count, batch=batch, per_image=per_image, dtype=torch.float32)
    upstream = torch.randn(batch, 64, 64, generator=torch.Generator().manual_seed(3))
    results = []
    before = numba.get_num_threads()
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.append(image_and_gradients(arrays, upstream))
        results[-1].append(
            render_volume(arrays[0].view(-1, count, 3)[0], arrays[1].view(-1, count)[0], arrays[2], 48, PIXEL)
        )
    numba.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_float32_on_the_cpu_takes_the_fast_path_and_float64_the_reference():
    cpu = torch.device("cpu")
    assert choose_backend(cpu) == "numba"
    assert choose_backend(cpu, torch.float64) == "torch"
    assert choose_backend(cpu, wanted="torch") == "torch"


def test_a_backend_that_cannot_take_the_tensors_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"projector = numba: cannot take torch.float64 on cpu .* choose auto or .*torch"
    ):
        choose_backend(torch.device("cpu"), torch.float64, "numba")


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("wanted", [[3], [4], [3, 4]], ids=str)
def test_poses_get_the_gradient_of_the_reference(per_image, wanted):
    """The reference's own is that of autograd; a matrix that stays a rotation uses no other."""
    upstream = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = []
    for dtype, options in ((torch.float64, {"backend": "torch"}), (torch.float32, {"backend": "numba", "cut": 5.0})):
        arrays = [array.to(dtype) for array in scene(per_image=per_image)]
        leaves = [arrays[i].requires_grad_() for i in wanted]
        image = project(*arrays, box=64, pixel_size=PIXEL, **options)
        gradients.append(torch.autograd.grad(image, leaves, upstream.to(dtype)))
    # Sums of many terms of either sign: a few times the centres' 1e-5.
    assert all(relative(found, expected) < 5e-5 for expected, found in zip(*gradients, strict=True))


@pytest.mark.parametrize("box", [30, 31])
@pytest.mark.parametrize(("width_px", "image_budget"), [(0.3, 5e-6), (0.7, 1e-6), (3.0, 1e-6), (8.0, 1e-6)])
def test_narrow_and_wide_gaussians_are_the_reference(width_px, image_budget, box):
    """At 8 px a window of 5 σ is wider than the box and spans several vectors. At 0.3 px a centre's rounding to float32
    alone is 1.5e-6 of the image."""
    centres, amplitudes, _, *pose = scene(count=40, box=box)
    arrays = [centres, amplitudes, torch.full((40,), width_px * PIXEL, dtype=torch.float64), *pose]
    upstream = torch.randn(3, box, box, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = image_and_gradients(arrays, upstream, backend="torch")
    found = image_and_gradients([a.float() for a in arrays], upstream, cut=5.0)
    errors = [relative(f, e) for f, e in zip(found, expected, strict=True)]
    assert all(error < budget for error, budget in zip(errors, (image_budget, 1e-5, 1e-5, 1e-5), strict=True)), errors


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    ("argument", "shape"),
    [(0, (195, 3)), (0, (2, 200, 3)), (1, (195,)), (1, (3, 1)), (1, (1,)), (2, (1,)), (3, (1, 3, 3)), (4, (1, 2))],
)
def test_shapes_that_do_not_belong_together_are_refused(argument, shape, backend):
    arrays = scene(dtype=torch.float32)
    arrays[argument] = torch.ones(shape)
    with pytest.raises(ValueError, match="do not belong together"):
        project(*arrays, box=16, pixel_size=PIXEL, backend=backend)


def test_many_gaussians_of_few_images_are_divided_without_loss():
    """One image of 5,000 Gaussians is worked on in several parts."""
    arrays = scene(count=5000, batch=1)
    upstream = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = image_and_gradients(arrays, upstream, backend="torch")
    found = image_and_gradients([a.float() for a in arrays], upstream, cut=5.0)
    errors = [relative(f, e) for f, e in zip(found, expected, strict=True)]
    assert all(error < budget for error, budget in zip(errors, (1e-6, 1e-5, 1e-5, 1e-5), strict=True)), errors


def test_a_centre_that_is_no_number_does_not_pass_unseen():
    centres, amplitudes, widths, *pose = scene(count=5, per_image=False, dtype=torch.float32)
    centres[2, 1] = float("nan")
    assert not torch.isfinite(project(centres, amplitudes, widths, *pose, box=16, pixel_size=PIXEL)).all()


@pytest.mark.parametrize("box", [32, 33])
def test_map_of_gaussians_is_the_sum_of_their_densities(box):
    centres, amplitudes, widths, *_ = scene(count=12, box=box, per_image=False, dtype=torch.float32)
    axis = (torch.arange(box) - box // 2) * PIXEL
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], dim=-1).reshape(-1, 1, 3)
    expected = (
        (amplitudes * torch.exp(-((points - centres) ** 2).sum(-1) / (2 * widths**2))).sum(-1).reshape(box, box, box)
    )
    found = render_volume(centres, amplitudes, widths, box, PIXEL, cut=6.0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_summing_a_map_along_z_is_its_projection():
    centres, amplitudes, widths, *_ = scene(count=30, box=24, per_image=False, dtype=torch.float32)
    image = project(
        centres, amplitudes, widths, torch.eye(3)[None], torch.zeros(1, 2), box=48, pixel_size=PIXEL, cut=6
    )[0]
    summed = render_volume(centres, amplitudes, widths, 48, PIXEL, cut=6).sum(0) * PIXEL
    assert relative(summed, image) < 1e-5  # the sum over samples of a Gaussian wider than a pixel is its integral


@pytest.mark.parametrize("width_px", [0.7, 3.0, 8.0])
def test_map_of_narrow_and_wide_gaussians_holds_their_densities(width_px):
    centres, amplitudes, _, *_ = scene(count=12, box=20, per_image=False, dtype=torch.float32)
    widths = torch.full((12,), width_px * PIXEL)
    axis = (torch.arange(20, dtype=torch.float64) - 10) * PIXEL
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], dim=-1).reshape(-1, 1, 3)
    squares = ((points - centres.double()) ** 2).sum(-1)
    expected = (amplitudes * torch.exp(-squares / (2 * widths.double() ** 2))).sum(-1).reshape(20, 20, 20)
    assert relative(render_volume(centres, amplitudes, widths, 20, PIXEL, cut=6.0), expected) < 1e-6


def test_map_of_no_gaussians_and_of_gaussians_outside_is_empty():
    nothing = render_volume(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), 9, PIXEL)
    outside = torch.tensor([[1e3, 0, 0], [0, -1e3, 0], [0, 0, 1e3], [1e9, 1e9, 1e9]])
    assert not nothing.any()
    assert not render_volume(outside, torch.ones(4), torch.full((4,), 5.0), 9, PIXEL).any()


def test_map_is_linear_in_the_amplitudes():
    centres, first, widths, *_ = scene(count=30, box=24, per_image=False, dtype=torch.float32)
    second = torch.flip(first, (0,))
    a, b, mixed = (render_volume(centres, m, widths, 24, PIXEL) for m in (first, second, first - 2 * second))
    assert torch.allclose(mixed, a - 2 * b, atol=1e-5)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_what_is_no_number_shows_in_the_map(argument):
    for axis in range(3):
        arrays = [torch.zeros(3, 3), torch.ones(3), torch.full((3,), 5.0)]
        arrays[argument].view(3, -1)[1, axis % arrays[argument].view(3, -1).shape[1]] = float("nan")
        assert not torch.isfinite(render_volume(*arrays, 9, PIXEL)).all()
