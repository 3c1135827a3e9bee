"""How the images of a store are made from the stacks: read, brought to one grid, sign and background set.

A recipe is planned (`plan.py`) in the order of the particle file, or read back from a begun store in the store's order
(`shards.py`): making an image needs nothing else, so that any process on any machine can make any shard.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.images import background_mask, normalise, quantise, resample, resampling_matrix, to_half
from data_prep.stacks import Stack, read_slices
from spire_dist.errors import SourceError

SAME_EXTENT = 1e-4
"""Fields of view that differ by less than this fraction count as equal (1.31 and 1.3099979 Å/px are)."""
BATCH_BYTES = 2**20
"""Of images read and converted together: enough to be read in one piece, little enough to stay in a core's cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """Where the images of N rows are, and what is done to them."""

    stacks: list[Stack]
    stack: NDArray[np.int32]
    """[N], index into `stacks`."""
    slice: NDArray[np.int32]
    """[N], image in its stack, from 0."""
    pixel_size_a: NDArray[np.float64]
    """[N], Å/px of the image in its stack."""
    box: int
    """Side of the images made, px."""
    extent_a: float
    """Side of the images made, Å."""
    sign: int
    """1 or -1: the factor that makes protein positive."""
    radius_a: float | None
    """Background lies outside this radius (Å) and is brought to mean 0 and standard deviation 1; None leaves it."""
    dtype: str
    """float16, float32, or int8 of a compact store."""

    def name(self, row: int) -> str:
        """An image, as an error message calls it."""
        return f"{self.stacks[self.stack[row]].path}: image {self.slice[row] + 1}"


def read_pixels(recipe: Recipe, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images of rows [n], all of one stack, as they are there: float32 [n, box, box]."""
    return read_slices(recipe.stacks[recipe.stack[rows[0]]], recipe.slice[rows])


def on_common_grid(recipe: Recipe, rows: NDArray[np.int64], pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `read_pixels` gave for rows [n], on the grid of the store: float32 [n, D, D]; perhaps `pixels` itself."""
    box = pixels.shape[-1]
    sizes, of_row = np.unique(recipe.pixel_size_a[rows], return_inverse=True)
    matrices = [resampling_matrix(box, recipe.box, _span(box, recipe, size)) for size in sizes]
    if len(matrices) == 1:
        return resample(pixels, matrices[0])
    images = np.empty((len(rows), recipe.box, recipe.box), dtype=np.float32)
    for number, matrix in enumerate(matrices):  # optics groups may share a stack
        images[of_row == number] = resample(pixels[of_row == number], matrix)
    return images


def store_images(
    recipe: Recipe,
    rows: NDArray[np.int64],
    pixels: NDArray[np.float32],
    out: NDArray[np.generic],
    places: NDArray[np.int64],
) -> NDArray[np.float32] | None:
    """Make the images of rows [n] from their `pixels`, which it may use up, and put them, as stored, into `out[places]`.

    Returns the scales [n] of int8 images (pixel = value × scale), else None. Raises SourceError, naming stack and image,
    for a background without any noise and for values beyond the type.
    """
    images = on_common_grid(recipe, rows, pixels)
    pixel_size_a = recipe.extent_a / recipe.box
    if recipe.radius_a is not None:
        deviation = normalise(images, background_mask(recipe.box, recipe.radius_a / pixel_size_a), recipe.sign)
        if (flat := ~(deviation > 0)).any():
            raise SourceError(
                f"{recipe.name(rows[np.argmax(flat)])}: flat background outside {recipe.radius_a:.0f} Å (standard "
                "deviation 0) cannot be normalised; noise-free images need normalise off"
            )
    elif recipe.sign < 0:
        np.negative(images, out=images)
    if recipe.dtype == "int8":
        values, scales = quantise(images, normalised=recipe.radius_a is not None)
        out[places] = values
        return scales
    if recipe.dtype == "float16":
        finite = to_half(images, out.view(np.float16), places)
        if not finite.all():
            row = rows[np.argmin(finite)]
            raise SourceError(f"{recipe.name(row)}: values too large for float16; use dtype float32")
    else:
        out[places] = images
    return None


def batches_in_file_order(recipe: Recipe, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places in `rows` [n], sorted as the images lie in their files and cut into batches; no batch spans two files.

    The cuts depend on the rows alone: matrix products may round differently in another company, and the bytes of a store
    must not depend on who makes it.
    """
    order = np.lexsort((recipe.slice[rows], recipe.stack[rows]))
    pieces = np.split(order, np.flatnonzero(np.diff(recipe.stack[rows[order]])) + 1)
    batches = []
    for piece in pieces:
        size = max(BATCH_BYTES // (4 * recipe.stacks[recipe.stack[rows[piece[0]]]].box ** 2), 1)
        batches += [piece[i : i + size] for i in range(0, len(piece), size)]
    return batches


def _span(box: int, recipe: Recipe, pixel_size_a: float) -> float:
    """Side of the common field of view in an image's own pixels; rounded so that equal cases are exactly equal.

    Where it is the images' box or the recipe's but for `SAME_EXTENT`, it counts as that: nothing, or nothing but the
    field of view, changes then.
    """
    span = recipe.extent_a / pixel_size_a
    same = (side for side in (box, recipe.box) if abs(span / side - 1) < SAME_EXTENT)
    return float(next(same, round(span, 6)))
