"""Particle images brought to one box and pixel size, normalised, and judged for their contrast.

Called by `recipe.py` and `plan.py`. Every function is deterministic for the same batch of images.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


@cache
def resampling_matrix(box_in: int, box_out: int, span: float) -> NDArray[np.float32]:
    """Matrix A [box_out, box_in] with `A @ image @ A.T` the image on a coarser grid, its centre (index D // 2) kept.

    `span` is the side of the output in input pixels. With span = box_in this is Fourier cropping: the band-limited
    interpolation of the samples, without frequencies beyond the new Nyquist. A smaller span also crops in real space,
    to any fraction of a pixel, so that images of several pixel sizes can share one. Values keep their scale (a constant
    stays itself); the two Nyquist terms of an even grid are averaged, which is what keeps the result real.
    """
    assert box_out <= span <= box_in, "resampling only ever makes grids coarser and fields of view smaller"
    positions = (np.arange(box_out) - box_out // 2) * (span / box_out) + box_in // 2  # in input pixels
    distances = positions[:, None] - np.arange(box_in)[None, :]
    matrix = np.zeros((box_out, box_in))
    nyquist_out = box_in * box_out / span / 2  # in cycles per input box
    for k in range(box_in // 2 + 1):
        if k > nyquist_out + 1e-6:
            break
        at_an_end = k == 0 or 2 * k == box_in or abs(k - nyquist_out) < 1e-6
        weight = 1.0 if at_an_end else 2.0  # 2: k and -k
        matrix += weight * np.cos(2 * np.pi * k / box_in * distances)
    return (matrix / box_in).astype(np.float32)


def resample(images: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply `resampling_matrix` to images [n, box_in, box_in], giving [n, box_out, box_out]."""
    if matrix.shape[0] == matrix.shape[1]:  # same grid; a real-space crop by less than a pixel is never asked for
        return images
    return np.asarray(matrix @ (images @ matrix.T), dtype=np.float32)


def background_mask(box: int, radius_px: float) -> NDArray[np.bool_]:
    """[box, box], true outside the circle of `radius_px` around index box // 2."""
    axis = np.arange(box) - box // 2
    return axis[:, None] ** 2 + axis[None, :] ** 2 > radius_px**2


def background_statistics(
    images: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation [n] of each image's background, the pixels of `mask`."""
    mean, deviation, _ = _background(images, mask.astype(np.float32))
    return mean.astype(np.float32), deviation.astype(np.float32)


def normalise(images: NDArray[np.float32], mask: NDArray[np.bool_], sign: int) -> NDArray[np.float64]:
    """Bring the background of images [n, D, D] to mean 0 and standard deviation 1, in place, and multiply by `sign`.

    Returns the standard deviations [n] that were found; where one is 0 (flat to the last digits) the image is left.
    """
    mean, deviation, largest = _background(images, mask.astype(np.float32))
    deviation[deviation <= 1e-6 * largest] = 0.0
    _scale(images, mean.astype(np.float32), (sign / np.where(deviation > 0, deviation, np.inf)).astype(np.float32))
    return deviation


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _background(images, weights):
    """(mean, standard deviation, largest absolute value) [n] of the pixels whose weight [D, D] is 1 and not 0."""
    count, area = images.shape[0], weights.sum()
    mean, deviation, largest = np.zeros(count), np.zeros(count), np.zeros(count)
    for i in range(count):
        image = images[i]
        total = 0.0
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                total += np.float64(image[y, x] * weights[y, x])
        mean[i] = total / area
        centre, squares, top = np.float32(mean[i]), 0.0, np.float32(0.0)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                distance = image[y, x] - centre
                squares += np.float64(distance * distance * weights[y, x])
                top = max(top, abs(image[y, x]))
        deviation[i] = np.sqrt(squares / area)
        largest[i] = top
    return mean, deviation, largest


@njit(cache=True, nogil=True)
def _scale(images, mean, factor):
    """Subtract the mean and multiply: (images - mean) * factor where the factor [n] is not 0."""
    for i in range(images.shape[0]):
        if factor[i] != 0:
            image = images[i]
            for y in range(image.shape[0]):
                for x in range(image.shape[1]):
                    image[y, x] = (image[y, x] - mean[i]) * factor[i]


def to_half(images: NDArray[np.float32], out: NDArray[np.float16], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Round images [n, D, D] to float16 into `out[places]`; returns which [n] fit (have no value beyond 65,504).

    The same bits as numpy's own conversion, which takes several times as long.
    """
    return _to_half(images.view(np.uint32), out.view(np.uint16), places)


@njit(cache=True, nogil=True)
def _to_half(images, out, places):
    """IEEE 754 binary32 to binary16, to nearest and to even, without branches so that it becomes vector code."""
    fit = np.ones(images.shape[0], np.bool_)
    for i in range(images.shape[0]):
        image, target = images[i], out[places[i]]
        top = np.uint32(0)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                bits = image[y, x]
                sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
                size = bits & np.uint32(0x7FFFFFFF)
                top = max(top, size)
                # Normal: the exponent moves from bias 127 to 15, 13 bits go; what goes is rounded to even.
                odd = (size >> np.uint32(13)) & np.uint32(1)
                normal = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
                # Below 2^-14 the spacing is 2^-24: adding 0.5 to the float rounds there, and leaves the wanted bits.
                tiny = _bits(_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)  # pyright: ignore[reportCallIssue]
                half = tiny if size < np.uint32(0x38800000) else normal
                half = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else half
                target[y, x] = np.uint16(half | sign)
        fit[i] = top < np.uint32(0x477FF000)
    return fit


@intrinsic
def _float(typingctx, bits):
    """The float32 with these bits."""
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


@intrinsic
def _bits(typingctx, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


def quantise(images: NDArray[np.float32], *, normalised: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Images [n, D, D] as int8 and scales [n]: pixel ≈ value × scale.

    The step is 1/16 of the noise's standard deviation, which adds 0.03 % to its variance (step² / 12), or larger where
    the largest value would not fit into 127 steps. For normalised images, whose noise is 1, it is never larger than 1/4,
    so that a hot pixel cannot erase the image it lies in; values beyond 127 such steps (31.75), which only a faulty
    detector makes, are clipped. Of images that are not normalised nothing is clipped.
    """
    flat = images.reshape(len(images), -1)
    fitting = np.abs(flat).max(axis=1) / 127
    step = np.clip(fitting, 1 / 16, 1 / 4) if normalised else np.maximum(flat.std(axis=1) / 16, fitting)
    scales = np.where(step > 0, step, 1).astype(np.float32)
    return np.clip(np.rint(images / scales[:, None, None]), -127, 127).astype(np.int8), scales


def centre_contrast(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """How much brighter [n] the centre of each image is than its surroundings (scale of the images' noise).

    The weight is a Gaussian of 0.12 of the box, so only frequencies well below the first zero of any usual CTF count.
    There the CTF in our sign is positive (the amplitude contrast at 0, rising with underfocus), so that no phase needs
    flipping: bright-protein images have a positive contrast, whatever their defocus.
    """
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    weight = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * (0.12 * box) ** 2))
    weight -= weight.mean()
    weight /= np.linalg.norm(weight)
    return np.asarray(np.tensordot(images.astype(np.float64), weight, axes=2), dtype=np.float64)


def protein_sign(contrasts: NDArray[np.float64]) -> int:
    """+1 where `centre_contrast` of many images says bright protein, -1 for dark, 0 where they cannot tell.

    They tell when a mean of zero has a chance below 1e-4 (t-test over the images).
    """
    count = len(contrasts)
    if count < 2 or not np.any(contrasts != contrasts[0]):
        return 0
    from scipy import special  # here, because every process that makes shards would wait for it

    t = contrasts.mean() / (contrasts.std(ddof=1) / np.sqrt(count))
    chance = 2 * special.stdtr(count - 1, -abs(t))
    return int(np.sign(t)) if chance < 1e-4 else 0
