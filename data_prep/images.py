"""Particle images brought to one box and pixel size, normalised, and judged for their contrast. Numpy only.

Called by `plan.py` and `shards.py`. Every function is deterministic for the same batch of images.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats


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
    background = images[:, mask].astype(np.float64)
    return background.mean(axis=1).astype(np.float32), background.std(axis=1).astype(np.float32)


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
    if len(contrasts) < 2 or not np.any(contrasts != contrasts[0]):
        return 0
    chance = float(np.asarray(stats.ttest_1samp(contrasts, 0.0))[1])
    return int(np.sign(contrasts.mean())) if chance < 1e-4 else 0
