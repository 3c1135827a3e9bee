"""Projection of isotropic 3-D Gaussians to images, and their rasterisation to a map.

Density `V(p) = Σ_i m_i exp(-‖p - c_i‖² / (2 s_i²))`; its exact line integral along z after `c' = R c + t` is
`P(q) = Σ_i m_i √(2π) s_i exp(-‖q - c'_i‖² / (2 s_i²))` (CryoSPIRE equations 1 and 2). Both are sampled at pixel centres, the
origin at index `box // 2`. This is the point-sampled form: below a width of about 0.7 px it aliases.

One signature, four backends, chosen by the tensors' device and type unless told:

    torch          dense separable sum on any device, in any precision, differentiable in all inputs: the reference
    numba          local splat on the CPU, float32 (`kernels_cpu`)
    triton         local splat on a GPU, float32 (`kernels_gpu`)
    triton-dense   every pixel on a GPU, products in half precision: boxes of few pixels, wide Gaussians (`kernels_gpu`)
"""

import math
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from spire_dist.errors import ConfigError
from spire_dist.physics import kernels_cpu

# The five input arrays travel as one list, whose length the type checker does not know.
# pyright: reportCallIssue=false

Backend = Literal["auto", "torch", "numba", "triton", "triton-dense"]
DEFAULT_CUT = 4.0
"""Standard deviations at which the local splat ends: relative error 3e-5 in the image, 2e-4 in the centres' gradient."""


def choose_backend(device: torch.device, dtype: torch.dtype = torch.float32, wanted: Backend = "auto") -> Backend:
    """The backend for tensors of this device and type: the one wanted, else a local splat, else the reference.

    Raises ConfigError for one that cannot take them.
    """
    single = dtype == torch.float32
    able = {
        "numba": single and device.type == "cpu",
        "triton": single and _triton_runs(device.type),
        "triton-dense": single and _triton_runs(device.type),
        "torch": True,
    }
    if wanted == "auto":
        return next(name for name in ("numba", "triton", "torch") if able[name])
    if not able[wanted]:
        names = ", ".join(name for name, runs in able.items() if runs)
        raise ConfigError(
            f"projector = {wanted}: cannot take {dtype} on {device.type} here; choose auto or one of {names}"
        )
    return wanted


@cache
def _triton_runs(device: str) -> bool:
    """On a GPU, or on the CPU through Triton's interpreter, where Triton is installed."""
    there = device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return there and find_spec("triton") is not None


def project(
    centres: Tensor,
    amplitudes: Tensor,
    widths: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    box: int,
    pixel_size: float,
    cut: float = DEFAULT_CUT,
    backend: Backend = "auto",
) -> Tensor:
    """Images [B, box, box] (density × Å) of Gaussians seen in the poses of B particles; differentiable in the first five.

    centres     [N, 3] or [B, N, 3], Å, (x, y, z) from the centre of the box
    amplitudes  [N] or [B, N], peak density
    widths      [N], Å, standard deviation, positive
    rotations   [B, 3, 3], r_image = R @ r_volume; shifts [B, 2], Å, (x, y)
    cut         standard deviations at which a Gaussian ends, at least (dense backends sum to the edge of the box)
    backend     one of `Backend`; resolved by `choose_backend`

    Raises ConfigError for a backend that cannot take these tensors, ValueError for shapes that do not belong together.
    """
    batch, count = len(rotations), len(widths)
    given = tuple(tuple(t.shape) for t in (centres, amplitudes, widths, rotations, shifts))
    if (
        given[0] not in ((count, 3), (batch, count, 3))
        or given[1] not in ((count,), (batch, count))
        or given[2:] != ((count,), (batch, 3, 3), (batch, 2))
    ):
        raise ValueError(
            "centres [N, 3] or [B, N, 3], amplitudes [N] or [B, N], widths [N], rotations [B, 3, 3] and shifts [B, 2] do not "
            f"belong together: {', '.join(map(str, given))}"
        )
    backend = choose_backend(centres.device, centres.dtype, backend)
    if backend == "torch":
        planar = centres @ rotations[:, :2].transpose(1, 2) + shifts[:, None, :]  # [B, N, 2]
        weights = (amplitudes * (math.sqrt(2 * math.pi) * widths)).expand(planar.shape[:2])
        return splat_dense(planar / pixel_size + box // 2, weights, widths / pixel_size, box)
    # A leading 1 stands for what all images share.
    own = centres if centres.ndim == 3 else centres[None], amplitudes if amplitudes.ndim == 2 else amplitudes[None]
    return _Splat.apply(*own, widths, rotations, shifts, box, pixel_size, cut, backend)  # type: ignore[return-value]


def splat_dense(centres_px: Tensor, weights: Tensor, widths_px: Tensor, box: int) -> Tensor:
    """The reference: every Gaussian on every pixel. centres [B, N, 2] px, weights [B, N], widths [N] px -> [B, box, box]."""
    pixels = torch.arange(box, dtype=centres_px.dtype, device=centres_px.device)
    factor = -0.5 / widths_px**2  # [N]
    profile_x = torch.exp(factor[:, None] * (pixels - centres_px[..., 0:1]) ** 2)  # [B, N, box]
    profile_y = torch.exp(factor[:, None] * (pixels - centres_px[..., 1:2]) ** 2) * weights[..., None]
    return profile_y.transpose(1, 2) @ profile_x


class _Splat(torch.autograd.Function):
    """The kernels seen by autograd. Nothing is kept but the inputs."""

    @staticmethod
    def forward(ctx, centres, amplitudes, widths, rotations, shifts, box, pixel_size, cut, backend):
        inputs = [t.detach().contiguous() for t in (centres, amplitudes, widths, rotations, shifts)]
        ctx.save_for_backward(*inputs)
        ctx.pixel_size, ctx.cut, ctx.backend = pixel_size, cut, backend
        if backend == "numba":
            return torch.from_numpy(kernels_cpu.splat_forward(*(t.numpy() for t in inputs), box, pixel_size, cut))
        from spire_dist.physics import kernels_gpu

        if backend == "triton-dense":
            return kernels_gpu.dense_forward(*inputs, box, pixel_size)
        return kernels_gpu.splat_forward(*inputs, box, pixel_size, cut)

    @staticmethod
    def backward(ctx, *gradients):
        inputs, gradient = ctx.saved_tensors, gradients[0].contiguous()
        if ctx.backend == "numba":
            arrays = kernels_cpu.splat_backward(*(t.numpy() for t in inputs), ctx.pixel_size, ctx.cut, gradient.numpy())
            found = [torch.from_numpy(array) for array in arrays]
        else:
            from spire_dist.physics import kernels_gpu

            if ctx.backend == "triton-dense":
                found = kernels_gpu.dense_backward(*inputs, ctx.pixel_size, gradient)
            else:
                found = kernels_gpu.splat_backward(*inputs, ctx.pixel_size, ctx.cut, gradient)
        sums = [own.sum_to_size(shared.shape) for own, shared in zip(found, inputs[:3], strict=True)]
        wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        poses = pose_gradients(found[0], inputs[0], inputs[3]) if wanted else (None, None)
        return *sums, *poses, None, None, None, None


def pose_gradients(d_centres: Tensor, centres: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rotations [B, 3, 3] and shifts [B, 2] from those of the centres [B, N, 3], which lie at [B or 1, N, 3].

    With q = (R c + t) in x and y, a centre's gradient is g = Pᵀ ∂L/∂q, P the first two rows of R. They are orthonormal, so
    ∂L/∂q = P g, whose sum is ∂L/∂t, and ∂L/∂P = Σ ∂L/∂q cᵀ = P Σ g cᵀ: nine numbers per image, whatever N.
    """
    planar = rotations[:, :2]
    d_planar = planar @ (d_centres.transpose(1, 2) @ centres)
    d_shifts = (planar @ d_centres.sum(1)[..., None])[..., 0]
    return torch.nn.functional.pad(d_planar, (0, 0, 0, 1)), d_shifts


def render_volume(
    centres: Tensor, amplitudes: Tensor, widths: Tensor, box: int, pixel_size: float, cut: float = DEFAULT_CUT
) -> Tensor:
    """Map [box, box, box], indexed [z, y, x], of Gaussians: centres [N, 3] Å, amplitudes [N], widths [N] Å.

    Not differentiable. Computed on the CPU in float32, returned there.
    """
    volume = torch.empty(box, box, box)
    pixels = (centres / pixel_size + box // 2, amplitudes, widths / pixel_size)
    points, peaks, sigmas = (t.detach().to("cpu", torch.float32).contiguous().numpy() for t in pixels)
    kernels_cpu.rasterise(points, peaks, sigmas, cut, volume.numpy())
    return volume
