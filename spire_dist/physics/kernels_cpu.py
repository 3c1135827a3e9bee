"""The CPU projector: a local splat in numba, forward and backward, compiled on first use and cached; no compiler needed.

Each Gaussian touches only the pixels within `cut` standard deviations, so the work does not depend on the box. One thread
owns one image, so there are no atomics and the result has the same bits on any number of threads. Windows are padded to
whole vectors of eight pixels: the padding is multiplied by zeros, which is cheaper than a scalar remainder loop.
Called by `projector` only; everything here is in pixels and float32.
"""

import math

import numpy as np
from numba import njit, prange

LANES = 8


@njit(inline="always")
def _window(centre, reach, box):  # pragma: no cover - compiled
    """First and last pixel whose area is within reach, clipped to the box (empty when last < first)."""
    return max(0, math.ceil(centre - reach - 0.5)), min(box - 1, math.floor(centre + reach + 0.5))


@njit(inline="always")
def _profile(out, centre, first, last, padded, inverse):  # pragma: no cover - compiled
    """exp(-(i - centre)² inverse) for i = first..last into `out`, then zeros up to `padded`."""
    for i in range(last - first + 1):
        distance = np.float32(first + i) - centre
        out[i] = math.exp(-distance * distance * inverse)
    for i in range(last - first + 1, padded):
        out[i] = np.float32(0)


@njit(parallel=True, cache=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def splat_forward(centres, weights, widths, cut, box, images):  # pragma: no cover - compiled
    """Add Gaussians: centres [B, N, 2] (x, y), weights [B, N], widths [N] into zeroed images [B, box, box]."""
    batch, count = weights.shape
    stride = box + LANES
    for b in prange(batch):
        canvas = np.zeros((box, stride), dtype=np.float32)
        profile_x = np.empty(stride, dtype=np.float32)
        profile_y = np.empty(stride, dtype=np.float32)
        for n in range(count):
            weight = weights[b, n]
            reach = cut * widths[n]
            x0, x1 = _window(centres[b, n, 0], reach, box)
            y0, y1 = _window(centres[b, n, 1], reach, box)
            if weight == 0 or x1 < x0 or y1 < y0:
                continue
            inverse = np.float32(0.5) / (widths[n] * widths[n])
            vectors = (x1 - x0 + LANES) // LANES
            _profile(profile_x, centres[b, n, 0], x0, x1, vectors * LANES, inverse)
            _profile(profile_y, centres[b, n, 1], y0, y1, y1 - y0 + 1, inverse)
            for j in range(y1 - y0 + 1):
                row = weight * profile_y[j]
                for v in range(vectors):
                    for lane in range(LANES):
                        canvas[y0 + j, x0 + v * LANES + lane] += row * profile_x[v * LANES + lane]
        images[b] = canvas[:, :box]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, error_model="numpy")
def splat_backward(
    centres, weights, widths, cut, gradient, d_centres, d_weights, d_widths
):  # pragma: no cover - compiled
    """Gradients of `splat_forward` from the images' gradient [B, box, box]; all outputs are per image:

    d_centres [B, N, 2], d_weights [B, N], d_widths [B, N] (the caller sums the last over images). Four moments of the
    window are enough: sums of g·G times 1, dx, dy and dx² + dy². They are gathered by column first, so that the long
    loop runs along whole vectors and only the last one sums across them.
    """
    batch, count = weights.shape
    box = gradient.shape[1]
    stride = box + LANES
    for b in prange(batch):
        canvas = np.zeros((box, stride), dtype=np.float32)
        canvas[:, :box] = gradient[b]
        profile_x = np.empty(stride, dtype=np.float32)
        profile_y = np.empty(stride, dtype=np.float32)
        column_0 = np.empty(stride, dtype=np.float32)
        column_1 = np.empty(stride, dtype=np.float32)
        column_2 = np.empty(stride, dtype=np.float32)
        for n in range(count):
            width = widths[n]
            reach = cut * width
            cx, cy = centres[b, n, 0], centres[b, n, 1]
            x0, x1 = _window(cx, reach, box)
            y0, y1 = _window(cy, reach, box)
            if x1 < x0 or y1 < y0:
                d_centres[b, n, 0] = d_centres[b, n, 1] = d_weights[b, n] = d_widths[b, n] = np.float32(0)
                continue
            inverse = np.float32(0.5) / (width * width)
            vectors = (x1 - x0 + LANES) // LANES
            _profile(profile_x, cx, x0, x1, vectors * LANES, inverse)
            _profile(profile_y, cy, y0, y1, y1 - y0 + 1, inverse)
            for i in range(vectors * LANES):
                column_0[i] = column_1[i] = column_2[i] = np.float32(0)
            for j in range(y1 - y0 + 1):
                dy = np.float32(y0 + j) - cy
                row_0 = profile_y[j]
                row_1 = row_0 * dy
                row_2 = row_1 * dy
                for v in range(vectors):
                    for lane in range(LANES):
                        i = v * LANES + lane
                        value = canvas[y0 + j, x0 + i]
                        column_0[i] += row_0 * value
                        column_1[i] += row_1 * value
                        column_2[i] += row_2 * value
            moment_0 = moment_x = moment_y = moment_2 = np.float32(0)
            for i in range(x1 - x0 + 1):
                dx = np.float32(x0 + i) - cx
                moment_0 += profile_x[i] * column_0[i]
                moment_x += profile_x[i] * dx * column_0[i]
                moment_y += profile_x[i] * column_1[i]
                moment_2 += profile_x[i] * (dx * dx * column_0[i] + column_2[i])
            scale = np.float32(2) * inverse * weights[b, n]
            d_centres[b, n, 0] = scale * moment_x
            d_centres[b, n, 1] = scale * moment_y
            d_weights[b, n] = moment_0
            d_widths[b, n] = scale * moment_2 / width


@njit(parallel=True, cache=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def rasterise(centres, weights, widths, cut, volume):  # pragma: no cover - compiled
    """Add 3-D Gaussians: centres [N, 3] (x, y, z), weights [N], widths [N] into a zeroed volume [box, box, box] (z, y, x).

    One thread owns one z section, so the result does not depend on the number of threads.
    """
    box = volume.shape[0]
    for z in prange(box):
        profile_x = np.empty(box + LANES, dtype=np.float32)
        for n in range(weights.shape[0]):
            reach = cut * widths[n]
            dz = np.float32(z) - centres[n, 2]
            if abs(dz) > reach + 0.5 or weights[n] == 0:
                continue
            x0, x1 = _window(centres[n, 0], reach, box)
            y0, y1 = _window(centres[n, 1], reach, box)
            inverse = np.float32(0.5) / (widths[n] * widths[n])
            _profile(profile_x, centres[n, 0], x0, x1, x1 - x0 + 1, inverse)
            for y in range(y0, y1 + 1):
                dy = np.float32(y) - centres[n, 1]
                row = weights[n] * np.float32(math.exp(-(dy * dy + dz * dz) * inverse))
                for x in range(x0, x1 + 1):
                    volume[z, y, x] += row * profile_x[x - x0]


@njit(cache=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
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
