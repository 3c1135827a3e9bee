"""The network of every (image, Gaussian) pair on the CPU, forward and backward, in numba. Called by `deformation` only.

A tensor of images × Gaussians × hidden units is far larger than any cache and costs more to write and read than to compute,
so none is made: a task takes `BLOCK` Gaussians and one image at a time, all layers in the nearest cache, and the backward
pass computes the layers again. Gaussians lie along the vector, so the first layer's two halves are one addition each.

A task owns a range of Gaussians and a range of images; both ranges follow from the sizes alone and every sum over tasks is
taken in their order, so the result has the same bits on any number of threads.
"""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from spire_dist.physics.simd import LANES, add_totals, fma, larger, load, spread, store, where_positive

Floats = NDArray[np.float32]
BLOCK = 128
"""Gaussians worked on at once: with 64 units a layer of them is as large as a first-level cache."""
TILE = 4
"""Rows of a product held in registers; sizes are padded to it."""
TASKS = 64
WEIGHTS_IN_FLIGHT = 2**24
"""Gradients of weights that all tasks hold together before they are summed."""
ZERO = np.float32(0)


def pair_forward(
    latents: Floats, features: Floats, middle: Floats, biases: Floats, last: Floats, bias: Floats
) -> Floats:
    """Outputs [B, N, O] of the network whose first layer is relu(latents[b] + features[n]).

    latents [B, H] and features [N, H] after their halves of the first layer; middle [L - 1, H, H] (out, in) and biases
    [L - 1, H] of the further hidden layers; last [O, H] and bias [O]. All float32.
    """
    outputs = len(last)
    out = np.empty((len(latents), len(features), outputs), dtype=np.float32)
    sizes = _ranges(len(latents), len(features), middle.size)
    forward = np.ascontiguousarray(_pad(middle, 1, 2).transpose(0, 2, 1))
    _forward(
        _pad(latents, 1), _blocked(features), forward, _pad(biases, 1), _pad(last, 0, 1).T.copy(), _pad(bias, 0), *sizes, out
    )  # fmt: skip
    return out


def pair_backward(
    latents: Floats, features: Floats, middle: Floats, biases: Floats, last: Floats, gradient: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Gradients of the six arguments of `pair_forward`, in its order, from that of the outputs [B, N, O]."""
    (batch, hidden), count, outputs = latents.shape, len(features), len(last)
    parts, groups = _ranges(batch, count, middle.size)
    latents, blocked, padded, last = _pad(latents, 1), _blocked(features), _pad(middle, 1, 2), _pad(last, 0, 1)
    size, rows, tasks = latents.shape[1], len(last), parts * groups
    d_latents = np.zeros((parts, batch, size), dtype=np.float32)
    d_features = np.zeros((groups, *blocked.shape), dtype=np.float32)
    d_middle = np.zeros((tasks, *padded.shape), dtype=np.float32)
    d_biases = np.zeros((tasks, len(middle), size), dtype=np.float32)
    d_last = np.zeros((tasks, rows, size), dtype=np.float32)
    d_bias = np.zeros((tasks, rows), dtype=np.float32)
    _backward(
        latents, blocked, np.ascontiguousarray(padded.transpose(0, 2, 1)), padded, _pad(biases, 1), last, gradient, count,
        parts, groups, d_latents, d_features, d_middle, d_biases, d_last, d_bias,
    )  # fmt: skip
    per_gaussian = d_features.sum(0).transpose(0, 2, 1).reshape(-1, size)[:count, :hidden]
    return (
        d_latents.sum(0)[:, :hidden],
        per_gaussian,
        d_middle.sum(0)[:, :hidden, :hidden],
        d_biases.sum(0)[:, :hidden],
        d_last.sum(0)[:outputs, :hidden],
        d_bias.sum(0)[:outputs],
    )


def _ranges(batch: int, count: int, weights: int) -> tuple[int, int]:
    """(ranges of Gaussians, ranges of images): tasks for many cores, but no more than may hold `weights` gradients each."""
    tasks = max(1, min(TASKS, WEIGHTS_IN_FLIGHT // max(1, weights)))
    parts = max(1, min(tasks, -(-count // BLOCK)))
    return parts, max(1, min(batch, -(-tasks // parts)))


def _pad(array: Floats, *axes: int) -> Floats:
    """Zeros behind the end of `axes`, up to a whole number of tiles. (`np.pad` takes longer than a small network.)"""
    shape = tuple(size + -size % TILE if axis in axes else size for axis, size in enumerate(array.shape))
    if shape == array.shape:
        return np.ascontiguousarray(array)
    padded = np.zeros(shape, dtype=np.float32)
    padded[tuple(map(slice, array.shape))] = array
    return padded


def _blocked(features: Floats) -> Floats:
    """[N, H] -> [blocks, H padded, BLOCK]: a unit's values of a block's Gaussians lie side by side."""
    count, hidden = features.shape
    padded = np.zeros((-(-count // BLOCK) * BLOCK, hidden + -hidden % TILE), dtype=np.float32)
    padded[:count, :hidden] = features
    return np.ascontiguousarray(padded.reshape(-1, BLOCK, padded.shape[1]).transpose(0, 2, 1))


@njit(error_model="numpy")
def _product(weights, bias, x, least, mask, out):  # pragma: no cover - compiled
    """out[r] = bias[r] + Σ_c weights[c, r] x[c]: x and out flat [units × BLOCK], weights [columns, rows].

    At least `least` (0 is a ReLU; None: any); zero where `mask`, of out's shape, is not positive (None: nowhere).
    """
    columns, rows = weights.shape
    for v in range(0, BLOCK, TILE * LANES):
        for r in range(0, rows, TILE):
            a00, a10, a20, a30 = spread(bias[r]), spread(bias[r + 1]), spread(bias[r + 2]), spread(bias[r + 3])
            a01 = a02 = a03 = a00
            a11 = a12 = a13 = a10
            a21 = a22 = a23 = a20
            a31 = a32 = a33 = a30
            for c in range(columns):
                at = c * BLOCK + v
                x0, x1, x2, x3 = load(x, at), load(x, at + LANES), load(x, at + 2 * LANES), load(x, at + 3 * LANES)
                w = spread(weights[c, r])
                a00, a01, a02, a03 = fma(w, x0, a00), fma(w, x1, a01), fma(w, x2, a02), fma(w, x3, a03)
                w = spread(weights[c, r + 1])
                a10, a11, a12, a13 = fma(w, x0, a10), fma(w, x1, a11), fma(w, x2, a12), fma(w, x3, a13)
                w = spread(weights[c, r + 2])
                a20, a21, a22, a23 = fma(w, x0, a20), fma(w, x1, a21), fma(w, x2, a22), fma(w, x3, a23)
                w = spread(weights[c, r + 3])
                a30, a31, a32, a33 = fma(w, x0, a30), fma(w, x1, a31), fma(w, x2, a32), fma(w, x3, a33)
            _store_row(out, r * BLOCK + v, least, mask, a00, a01, a02, a03)
            _store_row(out, (r + 1) * BLOCK + v, least, mask, a10, a11, a12, a13)
            _store_row(out, (r + 2) * BLOCK + v, least, mask, a20, a21, a22, a23)
            _store_row(out, (r + 3) * BLOCK + v, least, mask, a30, a31, a32, a33)


@njit(inline="always")
def _store_row(out, at, least, mask, a, b, c, d):  # pragma: no cover - compiled
    _store_bounded(out, at, least, mask, a)
    _store_bounded(out, at + LANES, least, mask, b)
    _store_bounded(out, at + 2 * LANES, least, mask, c)
    _store_bounded(out, at + 3 * LANES, least, mask, d)


@njit(inline="always")
def _store_bounded(out, at, least, mask, value):  # pragma: no cover - compiled
    if least is not None:  # both decided when compiled
        value = larger(value, spread(least))
    if mask is not None:
        value = where_positive(load(mask, at), value)
    store(out, at, value)


@njit(error_model="numpy")
def _add_outer(x, y, result):  # pragma: no cover - compiled
    """result[r, c] += Σ x[r] y[c] over the block's Gaussians: x and y flat [units × BLOCK]."""
    rows, columns = result.shape
    flat = result.reshape(-1)
    for r in range(0, rows, TILE):
        for c in range(0, columns, TILE):
            a00 = spread(0)
            a01 = a02 = a03 = a10 = a11 = a12 = a13 = a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = a00
            for v in range(0, BLOCK, LANES):
                i, j = r * BLOCK + v, c * BLOCK + v
                y0, y1 = load(y, j), load(y, j + BLOCK)
                y2, y3 = load(y, j + 2 * BLOCK), load(y, j + 3 * BLOCK)
                x0 = load(x, i)
                a00, a01, a02, a03 = fma(x0, y0, a00), fma(x0, y1, a01), fma(x0, y2, a02), fma(x0, y3, a03)
                x1 = load(x, i + BLOCK)
                a10, a11, a12, a13 = fma(x1, y0, a10), fma(x1, y1, a11), fma(x1, y2, a12), fma(x1, y3, a13)
                x2 = load(x, i + 2 * BLOCK)
                a20, a21, a22, a23 = fma(x2, y0, a20), fma(x2, y1, a21), fma(x2, y2, a22), fma(x2, y3, a23)
                x3 = load(x, i + 3 * BLOCK)
                a30, a31, a32, a33 = fma(x3, y0, a30), fma(x3, y1, a31), fma(x3, y2, a32), fma(x3, y3, a33)
            add_totals(flat, r * columns + c, a00, a01, a02, a03)
            add_totals(flat, (r + 1) * columns + c, a10, a11, a12, a13)
            add_totals(flat, (r + 2) * columns + c, a20, a21, a22, a23)
            add_totals(flat, (r + 3) * columns + c, a30, a31, a32, a33)


@njit(error_model="numpy")
def _first(latent, feature, out):  # pragma: no cover - compiled
    """relu(latent + feature) of one image and one block of Gaussians."""
    zero = spread(0)
    for h in range(len(latent)):
        own = spread(latent[h])
        for at in range(h * BLOCK, (h + 1) * BLOCK, LANES):
            store(out, at, larger(own + load(feature, at), zero))


@njit(error_model="numpy")
def _sums(x, out):  # pragma: no cover - compiled
    """out[r] += Σ x[r] over the block's Gaussians."""
    for r in range(0, len(out), TILE):
        a = b = c = d = spread(0)
        for at in range(r * BLOCK, (r + 1) * BLOCK, LANES):
            a, b = a + load(x, at), b + load(x, at + BLOCK)
            c, d = c + load(x, at + 2 * BLOCK), d + load(x, at + 3 * BLOCK)
        add_totals(out, r, a, b, c, d)


@njit(error_model="numpy")
def _add(x, result):  # pragma: no cover - compiled
    for at in range(0, len(x), LANES):
        store(result, at, load(result, at) + load(x, at))


@njit(error_model="numpy")
def _forward_block(latent, feature, middle, biases, last, bias, layers, result, out):  # pragma: no cover - compiled
    """All layers for one image and one block; layers [L, H × BLOCK] keep the hidden values; out [up to BLOCK, O]."""
    _first(latent, feature, layers[0])
    for level in range(len(middle)):
        _product(middle[level], biases[level], layers[level], ZERO, None, layers[level + 1])
    _product(last, bias, layers[len(middle)], None, None, result)
    for o in range(out.shape[1]):
        for n in range(out.shape[0]):
            out[n, o] = result[o * BLOCK + n]


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _forward(latents, features, middle, biases, last, bias, parts, groups, out):  # pragma: no cover - compiled
    """`middle` [L - 1, in, out] and `last` [in, out], as `_product` reads them."""
    batch, hidden = latents.shape
    blocks, rows, count = len(features), last.shape[1], out.shape[1]
    for task in prange(parts * groups):
        part, group = task // groups, task % groups
        layers = np.empty((len(middle) + 1, hidden * BLOCK), dtype=np.float32)
        result = np.empty(rows * BLOCK, dtype=np.float32)
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            feature = features[block].reshape(-1)
            start, end = block * BLOCK, min(count, (block + 1) * BLOCK)
            for b in range(batch * group // groups, batch * (group + 1) // groups):
                _forward_block(latents[b], feature, middle, biases, last, bias, layers, result, out[b, start:end])


@njit(error_model="numpy")
def _backward_block(
    latent, feature, middle, back, biases, last, gradient, layers, arriving, upper, lower, zeros,
    d_latent, d_feature, d_middle, d_biases, d_last, d_bias,
):  # fmt: skip # pragma: no cover - compiled
    """Add one image's and one block's share to the gradients; `upper` and `lower` hold what arrives at a layer."""
    _first(latent, feature, layers[0])
    for level in range(len(middle)):
        _product(middle[level], biases[level], layers[level], ZERO, None, layers[level + 1])
    for o in range(gradient.shape[1]):
        for n in range(gradient.shape[0]):
            arriving[o * BLOCK + n] = gradient[n, o]
        arriving[o * BLOCK + gradient.shape[0] : (o + 1) * BLOCK] = np.float32(0)  # an earlier, fuller block's
    _add_outer(arriving, layers[len(middle)], d_last)
    _sums(arriving, d_bias)
    _product(last, zeros, arriving, None, layers[len(middle)], upper)
    for level in range(len(middle) - 1, -1, -1):
        _add_outer(upper, layers[level], d_middle[level])
        _sums(upper, d_biases[level])
        _product(back[level], zeros, upper, None, layers[level], lower)
        upper, lower = lower, upper
    _add(upper, d_feature)
    _sums(upper, d_latent)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _backward(
    latents, features, middle, back, biases, last, gradient, count, parts, groups,
    d_latents, d_features, d_middle, d_biases, d_last, d_bias,
):  # fmt: skip # pragma: no cover - compiled
    """`middle` [L - 1, in, out] for the way forward, `back` [L - 1, out, in] and `last` [out, in] for the way back."""
    batch, hidden = latents.shape
    blocks, rows = len(features), len(last)
    for task in prange(parts * groups):
        part, group = task // groups, task % groups
        layers = np.empty((len(middle) + 1, hidden * BLOCK), dtype=np.float32)
        buffers = np.empty((2, hidden * BLOCK), dtype=np.float32)
        arriving = np.zeros(rows * BLOCK, dtype=np.float32)
        zeros = np.zeros(hidden, dtype=np.float32)
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            feature, d_feature = features[block].reshape(-1), d_features[group, block].reshape(-1)
            start, end = block * BLOCK, min(count, (block + 1) * BLOCK)
            for b in range(batch * group // groups, batch * (group + 1) // groups):
                _backward_block(
                    latents[b], feature, middle, back, biases, last, gradient[b, start:end],
                    layers, arriving, buffers[0], buffers[1], zeros,
                    d_latents[part, b], d_feature, d_middle[task], d_biases[task], d_last[task], d_bias[task],
                )  # fmt: skip
