"""The GPU kernels against a dense float64 sum written here: in Triton's interpreter, and on a GPU where there is one."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from spire_dist.physics.poses import random_rotations

triton = pytest.importorskip("triton", reason="needs Triton, which exists for Linux")
from spire_dist.physics import kernels_gpu, projector  # noqa: E402

PIXEL = 2.5
BUDGETS = {4.0: (1e-4, 5e-4, 1e-4, 1e-3), 5.0: (1e-6, 1e-5, 1e-5, 1e-5)}
"""Relative L2 errors of the image and of the gradients of centres, amplitudes and widths that a cut may cost."""
HALF_PRECISION = (5e-4, 1e-3, 1e-3, 1e-3)
Call = Callable[..., Any]


class Scene(NamedTuple):
    """Arguments of the kernels, and the gradient sent back through them; float64."""

    centres: Tensor
    amplitudes: Tensor
    widths: Tensor
    rotations: Tensor
    shifts: Tensor
    upstream: Tensor


def make_scene(box=32, count=45, batch=2, widths_px=(1.0, 2.0), shared=False, seed=0) -> Scene:
    """Gaussians in a ball of 0.36 boxes; every number is one that float32 holds."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, 3))
    radii = 0.36 * box * PIXEL * rng.uniform(size=(count, 1)) ** (1 / 3)
    images = 1 if shared else batch
    arrays = (
        directions / np.linalg.norm(directions, axis=1, keepdims=True) * radii + rng.normal(size=(images, count, 3)),
        rng.uniform(0.2, 1.0, (images, count)),
        rng.uniform(widths_px[0], widths_px[1], count) * PIXEL,
        random_rotations(batch, seed),
        rng.uniform(-9, 9, (batch, 2)),
        rng.standard_normal((batch, box, box)),
    )
    return Scene(*(torch.from_numpy(a).float().double() for a in arrays))


def reference(scene: Scene) -> list[Tensor]:
    """Image and gradients of every Gaussian on every pixel, the gradients summed over what images share."""
    leaves = [t.clone().requires_grad_() for t in scene[:3]]
    centres, amplitudes, widths = leaves
    box = scene.upstream.shape[-1]
    pixels = (torch.arange(box) - box // 2) * PIXEL
    planar = torch.einsum("bij,bnj->bni", scene.rotations, centres.expand(len(scene.rotations), -1, -1))[..., :2]
    offsets = pixels - (planar + scene.shifts[:, None])[..., None]  # [B, N, 2, box]
    profiles = torch.exp(-(offsets**2) / (2 * widths[:, None, None] ** 2))
    weights = amplitudes * math.sqrt(2 * math.pi) * widths
    image = torch.einsum("bny,bnx->byx", weights[..., None] * profiles[:, :, 1], profiles[:, :, 0])
    return [image.detach(), *torch.autograd.grad(image, leaves, scene.upstream)]


def image_and_gradients(scene: Scene, cut: float | None) -> list[Tensor]:
    """What `projector.project` gives in this process, interpreted or on its GPU; summed over what images share."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    leaves = [t.to(device, torch.float32).requires_grad_() for t in scene[:3]]
    *pose, upstream = (t.to(device, torch.float32) for t in scene[3:])
    # A leading 1 of the scene means shared, which `project` is told by leaving it out.
    shared = len(scene.centres) != len(scene.rotations)
    arrays = [leaves[0][0], leaves[1][0], leaves[2]] if shared else leaves
    backend = "triton-dense" if cut is None else "triton"
    image = projector.project(*arrays, *pose, upstream.shape[-1], PIXEL, cut or 4.0, backend)
    found = [image.detach(), *torch.autograd.grad(image, leaves, upstream)]
    return [f.cpu() for f in found]


def project(call: Call, scene: Scene, cut: float | None) -> list[Tensor]:
    """The same by the local splat, or without a cut by the dense sum."""
    return call(image_and_gradients, scene, cut)


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float((f.double() - e).norm() / e.norm()) for f, e in pairs]


def assert_within(budget: tuple[float, ...], found: list[Tensor], expected: list[Tensor]) -> None:
    measured = errors(found, expected)
    assert all(error < limit for error, limit in zip(measured, budget, strict=True)), measured


def interpreter(setup: str = "") -> ProcessPoolExecutor:
    """A process in which Triton interprets: the switch acts when a kernel is decorated, so not in this one."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy below 2.4, this is {np.__version__}")
    code = "import os\nos.environ['TRITON_INTERPRET'] = '1'\n" + setup
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=exec, initargs=(code, {}))


def call_on_gpu(function, *arguments):
    found = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
    return found.cpu() if isinstance(found, Tensor) else [f.cpu() for f in found]


@pytest.fixture(scope="module", params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def call(request):
    """Calls a function of `kernels_gpu` with tensors of the CPU, and returns such."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield call_on_gpu
    else:
        with interpreter() as pool:
            yield lambda *arguments: pool.submit(*arguments).result()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("box", [32, 36, 33])  # rows of whole sectors, of whole quads, of neither
@pytest.mark.parametrize("cut", [4.0, 5.0])
def test_splat_stays_within_its_error_budget(call: Call, cut: float, box: int, shared: bool):
    scene = make_scene(box, shared=shared)
    assert_within(BUDGETS[cut], project(call, scene, cut), reference(scene))


def test_gpus_without_wide_reductions_give_the_same():
    """The way of GPUs before sm_90, and programs that take several groups of Gaussians."""
    setup = (
        "from spire_dist.physics import kernels_gpu as k\nk.WARPS_ENOUGH = 2\nk._adds_quads = lambda images: False\n"
    )
    scene = make_scene(32)
    with interpreter(setup) as pool:
        found = project(lambda *arguments: pool.submit(*arguments).result(), scene, 5.0)
    assert_within(BUDGETS[5.0], found, reference(scene))


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize(("widths_px", "cut"), [((0.3, 0.6), 9.0), ((3.0, 8.0), 6.0)])
def test_narrow_and_wide_gaussians_are_right(call: Call, box: int, widths_px: tuple[float, float], cut: float):
    scene = make_scene(box, count=9, widths_px=widths_px)
    assert_within((1e-5, 1e-5, 1e-5, 1e-5), project(call, scene, cut), reference(scene))


def test_slope_of_the_splat_is_its_gradient(call: Call):
    scene = make_scene(24, count=5)
    direction = [1e-2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for t in scene[:3]]
    images = []
    for sign in (1, -1):
        moved = [t + sign * d for t, d in zip(scene[:3], direction, strict=True)]
        there = scene._replace(**dict(zip(Scene._fields, moved, strict=False)))
        images.append(project(call, there, 7.0)[0].double())
    slope = float(((images[0] - images[1]) / 2 * scene.upstream).sum())
    gradients = project(call, scene, 7.0)[1:]
    assert slope == pytest.approx(
        sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)), rel=1e-3
    )


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("cut", [6.0, None])
def test_gaussians_at_the_edge_are_cut_by_the_box(call: Call, cut: float | None, box: int):
    edge = box // 2 * PIXEL
    centres = [[-edge, 3.0, 5.0], [edge, edge, 0.0], [0.0, -edge - 4.0, 9.0], [edge + 6.0, -edge - 6.0, 0.0]]
    _, _, _, _, _, upstream = make_scene(box, batch=1)
    scene = Scene(
        torch.tensor([centres], dtype=torch.float64),
        torch.ones(1, 4, dtype=torch.float64),
        torch.full((4,), 5.0, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64)[None],
        torch.zeros(1, 2, dtype=torch.float64),
        upstream,
    )
    budget = HALF_PRECISION if cut is None else (1e-6, 1e-5, 1e-5, 1e-5)
    assert_within(budget, project(call, scene, cut), reference(scene))


@pytest.mark.parametrize("cut", [4.0, None])
def test_gaussians_outside_the_box_leave_nothing_and_get_no_gradient(call: Call, cut: float | None):
    inside = make_scene(32, count=1)
    far = torch.tensor([[1000.0, 0, 0], [0, -1000, 0], [1e9, 1e9, 0]]).expand(2, 3, 3)
    pose = torch.eye(3).expand(2, 3, 3), inside.shifts, inside.upstream
    alone = project(call, Scene(*inside[:3], *pose), cut)
    found = project(
        call,
        Scene(
            torch.cat([inside.centres, far], dim=1),
            torch.cat([inside.amplitudes, inside.amplitudes.expand(2, 3) * 0.9], dim=1),
            inside.widths.repeat(4),
            *pose,
        ),
        cut,
    )
    assert torch.equal(found[0], alone[0])
    for gradient, of_one in zip(found[1:], alone[1:], strict=True):
        first, rest = gradient.split((1, 3), dim=gradient.ndim - 1 - (gradient.ndim == 3))
        assert torch.equal(first, of_one)
        assert not rest.any()


@pytest.mark.parametrize("cut", [4.0, None])
@pytest.mark.parametrize(("count", "batch"), [(0, 2), (3, 0)])
def test_nothing_gives_empty_images_and_gradients(call: Call, count: int, batch: int, cut: float | None):
    some = make_scene(16, count=3)
    scene = Scene(
        some.centres[:1, :count], some.amplitudes[:1, :count], some.widths[:count], *(t[:batch] for t in some[3:])
    )
    *arrays, upstream = (t.float().contiguous() for t in scene)
    if cut is None:
        image = call(kernels_gpu.dense_forward, *arrays, 16, PIXEL)
        gradients = call(kernels_gpu.dense_backward, *arrays, PIXEL, upstream)
    else:
        image = call(kernels_gpu.splat_forward, *arrays, 16, PIXEL, cut)
        gradients = call(kernels_gpu.splat_backward, *arrays, PIXEL, cut, upstream)
    assert image.shape == (batch, 16, 16)
    assert not image.any()
    assert [g.shape for g in gradients] == [(batch, count, 3), (batch, count), (batch, count)]


@pytest.mark.parametrize("box", [24, 64, 65, 130])
@pytest.mark.parametrize("shared", [False, True])
def test_dense_sum_is_right_to_half_precision(call: Call, box: int, shared: bool):
    scene = make_scene(box, shared=shared, widths_px=(1.0, 6.0))
    assert_within(HALF_PRECISION, project(call, scene, None), reference(scene))


def test_dense_sum_split_over_gaussians_is_right(call: Call):
    scene = make_scene(24, count=600, batch=1)
    assert_within(HALF_PRECISION, project(call, scene, None), reference(scene))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_dense_sum_takes_amplitudes_and_gradients_of_any_size(call: Call, size: float):
    """Of either sign, and thousands of times smaller than the largest."""
    scene = make_scene(32)
    spread = torch.logspace(-4, 0, 45).double() * (-1) ** torch.arange(45)
    scene = scene._replace(amplitudes=scene.amplitudes * spread * size, upstream=scene.upstream / size)
    assert_within(HALF_PRECISION, project(call, scene, None), reference(scene))


def test_dense_sum_of_zeros_is_zero(call: Call):
    scene = make_scene(16, count=3)
    dark = scene._replace(amplitudes=0 * scene.amplitudes, upstream=0 * scene.upstream)
    assert not any(t.any() for t in project(call, dark, None))


@pytest.mark.parametrize("cut", [4.0, None])
@pytest.mark.parametrize("argument", [0, 1])
def test_what_is_no_number_shows_in_the_image(call: Call, argument: int, cut: float | None):
    scene = make_scene(16, count=3)
    scene[argument].view(2, 3, -1)[1, 2, 0] = float("nan")
    assert not torch.isfinite(project(call, scene, cut)[0][1]).all()


@pytest.mark.gpu
def test_all_but_the_forward_splat_give_the_same_bits_every_time():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scene = make_scene(128, count=5000, batch=8)
    for cut, first in ((4.0, 1), (None, 0)):
        results = [project(call_on_gpu, scene, cut)[first:] for _ in range(3)]
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_large_sets_are_right_on_a_gpu():
    """Programs that take many groups, images in many tiles, more than one wave of both."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scene = make_scene(256, count=20000, batch=16, shared=True)
    expected = [t.cpu() for t in reference(Scene(*(t.cuda() for t in scene)))]
    assert_within(BUDGETS[5.0], project(call_on_gpu, scene, 5.0), expected)
    assert_within((1e-3, 1e-3, 1e-3, 1e-3), project(call_on_gpu, scene, None), expected)
