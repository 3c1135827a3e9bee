"""The CPU projector: a local splat in numba, forward and backward, compiled on first use and cached; no compiler needed.

Each Gaussian touches only the pixels within `cut` standard deviations, so the work does not depend on the box. Rotation,
shift and line integral happen here too: nothing per image and Gaussian is written but its gradient. A window is a column
of vectors sixteen pixels wide (`simd`); what they hold beyond the cut are true values of the Gaussian, and the canvas is
wide enough to the right for those beyond the box.

One task owns a canvas: an image or, where images are few, one part of its Gaussians. The division depends on the sizes
alone and there are no atomics, so the result has the same bits on any number of threads. Called by `projector` only; as all
parallel numba code, from one Python thread at a time, and in new processes that were spawned, not forked.
"""

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from spire_dist.physics.simd import LANES, exp2, fma, load, ramp, spread, store, total

Floats = NDArray[np.float32]
ENOUGH_TASKS = 64
"""Below this many images, Gaussians are divided too."""
HALF_LOG2_E = np.float32(0.5 * math.log2(math.e))
SQRT_2PI = np.float32(math.sqrt(2 * math.pi))


def splat_forward(
    centres: Floats,
    amplitudes: Floats,
    widths: Floats,
    rotations: Floats,
    shifts: Floats,
    box: int,
    pixel_size: float,
    cut: float,
) -> Floats:
    """Images [B, box, box]. All arrays contiguous float32, lengths in Å:

    centres [B or 1, N, 3], amplitudes [B or 1, N], widths [N], rotations [B, 3, 3], shifts [B, 2]; one row serves all images.
    """
    parts = _parts(len(rotations), len(widths), box)
    images = np.empty((len(rotations), parts, box, box), dtype=np.float32)
    pixel, reach = np.float32(pixel_size), np.float32(cut)
    _forward(centres, amplitudes, widths, rotations, shifts, pixel, reach, images)
    return images[:, 0] if parts == 1 else images.sum(axis=1)


def splat_backward(
    centres: Floats,
    amplitudes: Floats,
    widths: Floats,
    rotations: Floats,
    shifts: Floats,
    pixel_size: float,
    cut: float,
    gradient: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Gradients per image from that of the images [B, box, box]: centres [B, N, 3], amplitudes [B, N], widths [B, N]."""
    batch, count = len(rotations), len(widths)
    outputs = [np.empty(shape, dtype=np.float32) for shape in ((batch, count, 3), (batch, count), (batch, count))]
    parts = _parts(batch, count, gradient.shape[1])
    pixel, reach = np.float32(pixel_size), np.float32(cut)
    _backward(centres, amplitudes, widths, rotations, shifts, pixel, reach, gradient, parts, *outputs)
    return outputs[0], outputs[1], outputs[2]


def _parts(batch: int, count: int, box: int) -> int:
    """Tasks per image: enough for many cores, but each with more to splat than its canvas costs to clear and add."""
    return max(1, min(ENOUGH_TASKS // max(batch, 1), count // max(1024, box * box // 8)))


@njit(inline="always")
def _pose(rotation, shift, pixel, box):  # pragma: no cover - compiled
    """Centre [x, y, z] Å -> pixel (x, y): two rows of three factors and an offset each."""
    middle = np.float32(box // 2)
    scale = np.float32(1) / pixel
    x = (rotation[0, 0] * scale, rotation[0, 1] * scale, rotation[0, 2] * scale, shift[0] * scale + middle)
    y = (rotation[1, 0] * scale, rotation[1, 1] * scale, rotation[1, 2] * scale, shift[1] * scale + middle)
    return x, y


@njit(inline="always")
def _apply(row, centres, n):  # pragma: no cover - compiled
    """One coordinate of Gaussian n. (A view `centres[n]` would be counted in and out, atomically.)"""
    return row[0] * centres[n, 0] + row[1] * centres[n, 1] + row[2] * centres[n, 2] + row[3]


@njit(inline="always")
def _window(centre, reach, box):  # pragma: no cover - compiled
    """First and last pixel whose area is within reach, clipped to the box; empty (last < first) beyond it.

    Clipped as numbers, before they become integers. A centre that is not a number gets the whole box, so that it is seen.
    Rounded by truncation of positive numbers, one instruction; `math.ceil` is a call that spills every vector.
    """
    none, whole = np.float32(0), np.float32(box)
    before = whole - centre + reach + np.float32(0.5)  # pixels from the first one to the end of the box
    until = centre + reach + np.float32(1.5)  # and from the box's first pixel to the last one
    before = before if before < whole else whole
    until = until if until < whole else whole
    before = before if before > none else none
    until = until if until > none else none
    return box - int(before), int(until) - 1


@njit(inline="always")
def _splat(canvas, stride, x, y, weight, width, reach, box, profile):  # pragma: no cover - compiled
    """Add weight exp(-((i - x)² + (j - y)²) / 2 width²) around (x, y) to the flat canvas; all in pixels."""
    x0, x1 = _window(x, reach, box)
    y0, y1 = _window(y, reach, box)
    if x1 < x0 or y1 < y0:
        return
    rows = y1 - y0 + 1
    factor = spread(-HALF_LOG2_E / (width * width))
    distance = ramp() + spread(np.float32(y0) - y)
    for j in range(0, rows, LANES):
        store(profile, j, exp2(distance * distance * factor) * spread(weight))
        distance = distance + spread(LANES)
    distance = ramp() + spread(np.float32(x0) - x)
    for i in range(x0, x1 + 1, LANES):
        across = exp2(distance * distance * factor)
        at = y0 * stride + i
        for j in range(rows):
            store(canvas, at, fma(spread(profile[j]), across, load(canvas, at)))
            at += stride
        distance = distance + spread(LANES)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _forward(centres, amplitudes, widths, rotations, shifts, pixel, cut, images):  # pragma: no cover - compiled
    batch, parts, box = images.shape[0], images.shape[1], images.shape[2]
    count, stride = len(widths), box + LANES
    for task in prange(batch * parts):
        b, part = task // parts, task % parts
        own = slice(count * part // parts, count * (part + 1) // parts)
        canvas = np.zeros(box * stride, dtype=np.float32)
        _forward_part(
            centres[b % len(centres)][own], amplitudes[b % len(amplitudes)][own], widths[own], rotations[b], shifts[b],
            pixel, cut, box, canvas,
        )  # fmt: skip
        images[b, part] = canvas.reshape(box, stride)[:, :box]


@njit(error_model="numpy", fastmath={"contract"})
def _forward_part(centres, amplitudes, widths, rotation, shift, pixel, cut, box, canvas):  # pragma: no cover - compiled
    profile = np.empty(box + LANES, dtype=np.float32)
    to_x, to_y = _pose(rotation, shift, pixel, box)
    for n in range(len(widths)):
        width = widths[n] / pixel
        weight = amplitudes[n] * (SQRT_2PI * widths[n])
        x, y = _apply(to_x, centres, n), _apply(to_y, centres, n)
        _splat(canvas, box + LANES, x, y, weight, width, cut * width, box, profile)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _backward(
    centres, amplitudes, widths, rotations, shifts, pixel, cut, gradient, parts, d_centres, d_amplitudes, d_widths
):  # pragma: no cover - compiled
    batch, box = gradient.shape[0], gradient.shape[1]
    count, stride = len(widths), box + LANES
    for task in prange(batch * parts):
        b, part = task // parts, task % parts
        own = slice(count * part // parts, count * (part + 1) // parts)
        canvas = np.zeros((box, stride), dtype=np.float32)
        canvas[:, :box] = gradient[b]
        _backward_part(
            centres[b % len(centres)][own], amplitudes[b % len(amplitudes)][own], widths[own], rotations[b], shifts[b],
            pixel, cut, box, canvas.reshape(-1), d_centres[b][own], d_amplitudes[b][own], d_widths[b][own],
        )  # fmt: skip


@njit(error_model="numpy", fastmath={"contract"})
def _backward_part(
    centres, amplitudes, widths, rotation, shift, pixel, cut, box, canvas, d_centres, d_amplitudes, d_widths
):  # pragma: no cover - compiled
    """Four moments of the window are enough: sums of g·G times 1, dx, dy and dx² + dy².

    They are gathered down the columns first, so that the long loop works on whole vectors and each moment is summed
    across its vector once.
    """
    stride = box + LANES
    profiles = np.empty((3, box + LANES), dtype=np.float32)
    profile_0, profile_1, profile_2 = profiles[0], profiles[1], profiles[2]
    to_x, to_y = _pose(rotation, shift, pixel, box)
    zero = np.float32(0)
    for n in range(len(widths)):
        width = widths[n] / pixel
        x, y = _apply(to_x, centres, n), _apply(to_y, centres, n)
        x0, x1 = _window(x, cut * width, box)
        y0, y1 = _window(y, cut * width, box)
        if x1 < x0 or y1 < y0:
            d_centres[n, 0] = d_centres[n, 1] = d_centres[n, 2] = d_amplitudes[n] = d_widths[n] = zero
            continue
        rows = y1 - y0 + 1
        factor = spread(-HALF_LOG2_E / (width * width))
        distance = ramp() + spread(np.float32(y0) - y)
        for j in range(0, rows, LANES):
            along = exp2(distance * distance * factor)
            store(profile_0, j, along)
            store(profile_1, j, along * distance)
            store(profile_2, j, along * distance * distance)
            distance = distance + spread(LANES)
        distance = ramp() + spread(np.float32(x0) - x)
        sum_0 = spread(zero)
        sum_x = sum_0
        sum_y = sum_0
        sum_2 = sum_0
        for i in range(x0, x1 + 1, LANES):
            column_0 = spread(zero)
            column_1 = column_0
            column_2 = column_0
            at = y0 * stride + i
            for j in range(rows):
                value = load(canvas, at)
                column_0 = fma(spread(profile_0[j]), value, column_0)
                column_1 = fma(spread(profile_1[j]), value, column_1)
                column_2 = fma(spread(profile_2[j]), value, column_2)
                at += stride
            across = exp2(distance * distance * factor)
            column_0 = column_0 * across
            sum_0 = sum_0 + column_0
            column_0 = column_0 * distance
            sum_x = sum_x + column_0
            sum_y = fma(across, column_1, sum_y)
            sum_2 = fma(column_0, distance, fma(across, column_2, sum_2))
            distance = distance + spread(LANES)
        moment_0 = total(sum_0)
        weight = amplitudes[n] * (SQRT_2PI * widths[n])
        scale = weight / (width * width)
        d_x, d_y = scale * total(sum_x), scale * total(sum_y)
        for k in range(3):
            d_centres[n, k] = to_x[k] * d_x + to_y[k] * d_y
        d_amplitudes[n] = SQRT_2PI * widths[n] * moment_0
        d_widths[n] = (scale / width * total(sum_2)) / pixel + SQRT_2PI * amplitudes[n] * moment_0


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def rasterise(centres, amplitudes, widths, cut, volume):  # pragma: no cover - compiled
    """Write 3-D Gaussians, all in pixels: centres [N, 3] (x, y, z), amplitudes [N], widths [N], into [box, box, box] (z, y, x).

    One task owns one section along z, so the result does not depend on the number of threads.
    """
    box = volume.shape[0]
    stride = box + LANES
    for z in prange(box):
        canvas = np.zeros(box * stride, dtype=np.float32)
        profile = np.empty(stride, dtype=np.float32)
        for n in range(len(widths)):
            reach = cut * widths[n]
            depth = np.float32(z) - centres[n, 2]
            if not abs(depth) > reach + np.float32(0.5):  # what is no number must be seen
                weight = amplitudes[n] * math.exp(-depth * depth / (2 * widths[n] * widths[n]))
                _splat(canvas, stride, centres[n, 0], centres[n, 1], weight, widths[n], reach, box, profile)
        volume[z] = canvas.reshape(box, stride)[:, :box]


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def insert_sections(transforms, weights, rotations, padding, numerator, weight):  # pragma: no cover - compiled
    """Spread central sections [B, D, D // 2 + 1] (real-to-complex layout) and their weights over a padded Fourier grid.

    A frequency k of the image lies at R^T k of the map (`r_image = R r_volume`). numerator and weight [M, M, M] have
    their zero frequency at M // 2; only one half of Fourier space is filled. Frequencies beyond D // 2 - 1 are left
    out. One thread, as neighbouring sections meet near the origin.
    """
    box = transforms.shape[1]
    middle = numerator.shape[0] // 2
    limit = (box // 2 - 1) ** 2
    for b in range(transforms.shape[0]):
        for row in range(box):
            ky = row if row < (box + 1) // 2 else row - box
            for kx in range(transforms.shape[2]):
                if kx * kx + ky * ky > limit or (kx == 0 and ky < 0):
                    continue
                value, share = transforms[b, row, kx], weights[b, row, kx]
                if kx == 0 and ky == 0:  # its mirror image is itself and would count twice
                    value, share = value * np.float32(0.5), share * np.float32(0.5)
                x = middle + padding * (rotations[b, 0, 0] * kx + rotations[b, 1, 0] * ky)
                y = middle + padding * (rotations[b, 0, 1] * kx + rotations[b, 1, 1] * ky)
                z = middle + padding * (rotations[b, 0, 2] * kx + rotations[b, 1, 2] * ky)
                x0, y0, z0 = math.floor(x), math.floor(y), math.floor(z)
                for dz in range(2):
                    fz = (z - z0) if dz else (z0 + 1 - z)
                    for dy in range(2):
                        fyz = fz * ((y - y0) if dy else (y0 + 1 - y))
                        for dx in range(2):
                            f = np.float32(fyz * ((x - x0) if dx else (x0 + 1 - x)))
                            numerator[z0 + dz, y0 + dy, x0 + dx] += f * value
                            weight[z0 + dz, y0 + dy, x0 + dx] += f * share
