"""The GPU projector in Triton: a local splat and a fused dense sum, forward and backward.

Called by `projector` only, which imports this module when it first needs it: Triton is not installed everywhere.

Arrays are contiguous float32 on one device; rotation, shift, the way to pixels and the chain rule back are in the kernels:

    centres     [B or 1, N, 3]  Å, (x, y, z) from the centre of the box; a leading 1 is shared by all images
    amplitudes  [B or 1, N]     peak density
    widths      [N]             Å, positive
    rotations   [B, 3, 3]       r_image = R @ r_volume
    shifts      [B, 2]          Å, (x, y)

Gradients of centres, amplitudes and widths are per image, [B, N, ...]: the caller sums over what was shared.

Local splat: a program is one warp. It takes 16 Gaussians of one image at a time and walks over their windows, each 8 columns
side by side; rows, and blocks of columns, are loops that end with the largest window of the 16. No width is compiled in, a
Gaussian of any width is two loops, and what is lost is the difference between the largest window and the others:
Gaussians stored in the order of their widths lose little. Eight pixels are the 32-byte sector that memory moves and adds
to, so windows are widened to whole sectors where the box allows it. Then a lane owns four neighbours: the backward loads
them at once and, from sm_90 on, the forward adds them in one 16-byte reduction. Compiled for sm_90, an inner step of a
warp is 20 instructions forward and 27 backward for 128 pixels (18 for 32 with one pixel per lane); setting up 16
Gaussians is 160 and 250. Before sm_90, with no such reduction, a lane adds one pixel and a warp takes 4 Gaussians, so that
it still adds whole sectors. The forward's sums come in any order, so its last bits vary; the backward gathers without
atomics and always gives the same bits.

Dense sum: every Gaussian on every pixel, as matrix products in half precision summed in float32. Profiles are made tile
by tile and never written to memory. They are scaled by 2^15, and weights (or the gradient) so that the largest is 2^15:
half precision then spans 29 bits below the largest, and amplitudes and gradients of any size fit. Gives the same
bits every time.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit
"""Untyped: the type checker takes a kernel for a function of Python."""
LANES = tl.constexpr(8)
"""Columns of a window side by side: pixels of a 32-byte sector."""
ROOT_2PI = tl.constexpr(math.sqrt(2 * math.pi))
HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))
"""exp(-d²/(2 s²)) is 2 to the power of -HALF_LOG2_E d²/s²."""
HEADROOM = tl.constexpr(15)
"""Powers of two between 1 and the largest number given to half precision, which ends just below 2^16."""


# ---- what all kernels share


@jit
def _to_pixels(rotations, shifts, image, box, per_px):
    """For x and y: (a, b, c, d) such that a pixel coordinate is a x + b y + c z + d, with x, y, z in Å."""
    r = rotations + image * 9
    t = shifts + image * 2
    middle = box // 2
    to_x = tl.load(r) * per_px, tl.load(r + 1) * per_px, tl.load(r + 2) * per_px, tl.load(t) * per_px + middle
    to_y = tl.load(r + 3) * per_px, tl.load(r + 4) * per_px, tl.load(r + 5) * per_px, tl.load(t + 1) * per_px + middle
    return to_x, to_y


@jit
def _load_gaussians(centres, amplitudes, widths, n, known, to_x, to_y, per_px):
    """Centre x and y in pixels, amplitude, width in Å, and what d² (px²) is multiplied by in the exponent of 2."""
    x = tl.load(centres + n * 3, mask=known, other=0.0)
    y = tl.load(centres + n * 3 + 1, mask=known, other=0.0)
    z = tl.load(centres + n * 3 + 2, mask=known, other=0.0)
    amplitude = tl.load(amplitudes + n, mask=known, other=0.0)
    width = tl.load(widths + n, mask=known, other=1.0)
    cx = to_x[0] * x + to_x[1] * y + to_x[2] * z + to_x[3]
    cy = to_y[0] * x + to_y[1] * y + to_y[2] * z + to_y[3]
    inverse = 1.0 / (width * per_px)
    return cx, cy, amplitude, width, inverse * inverse * -HALF_LOG2_E


@jit
def _store_gradients(
    d_centres, d_amplitudes, d_widths, n, known, to_x, to_y, per_px, amplitude, width, m0, mx, my, m2
):  # fmt: skip
    """From the moments Σ g G (1, dx, dy, dx² + dy²) in pixels to the gradients: Å, and the molecule's frame."""
    inverse = 1.0 / (width * per_px)
    by_square = amplitude * ROOT_2PI * inverse * inverse
    mx *= by_square * width
    my *= by_square * width
    tl.store(d_centres + n * 3, to_x[0] * mx + to_y[0] * my, mask=known)
    tl.store(d_centres + n * 3 + 1, to_x[1] * mx + to_y[1] * my, mask=known)
    tl.store(d_centres + n * 3 + 2, to_x[2] * mx + to_y[2] * my, mask=known)
    tl.store(d_amplitudes + n, width * ROOT_2PI * m0, mask=known)
    tl.store(d_widths + n, amplitude * ROOT_2PI * m0 + by_square * m2, mask=known)


# ---- local splat


@jit
def _window(centre, reach, known, box, ALIGN: tl.constexpr):
    """First pixel of a window, moved to a multiple of ALIGN, and number of pixels: 0 where it misses the box.

    A centre that is not a number gets the whole box, so that it is seen; comparisons keep it from becoming an address.
    """
    edge = box + 0.0
    first, last = tl.ceil(centre - reach), tl.floor(centre + reach)
    first = tl.where(first > 0.0, tl.where(first < edge, first, edge), 0.0).to(tl.int32)
    last = tl.where(last < edge - 1.0, tl.where(last > -1.0, last, -1.0), edge - 1.0).to(tl.int32)
    start = first // ALIGN * ALIGN
    return start, tl.where(known & (last >= first), last - start + 1, 0)


@jit
def _splat_forward(
    centres, amplitudes, widths, rotations, shifts, images, count, share, centre_stride, amplitude_stride, box, per_px, cut,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Add `share` Gaussians of one image to zeroed images, GROUP at a time."""
    programs = tl.cdiv(count, share)
    image = (tl.program_id(0) // programs).to(tl.int64)
    begin = tl.program_id(0) % programs * share
    to_x, to_y = _to_pixels(rotations, shifts, image, box, per_px)
    row = box // ALIGN * ALIGN  # equals box, and tells the compiler that rows are aligned
    centres += image * centre_stride
    amplitudes += image * amplitude_stride
    images += image * row * row
    for start in range(begin, min(begin + share, count), GROUP):
        n = start + tl.arange(0, GROUP)
        known = n < count
        cx, cy, amplitude, width, factor = _load_gaussians(centres, amplitudes, widths, n, known, to_x, to_y, per_px)
        reach = cut * per_px * width + 0.5
        x0, columns = _window(cx, reach, known, box, ALIGN)
        y0, rows = _window(cy, reach, known, box, 1)
        weight = amplitude * width * ROOT_2PI
        most_rows = tl.max(rows)
        for block in range(0, tl.max(columns), LANES):
            i = block + tl.arange(0, LANES)
            x = x0[:, None] + i[None, :]
            dx = x.to(tl.float32) - cx[:, None]
            profile_x = weight[:, None] * tl.exp2(factor[:, None] * dx * dx)
            inside = (i // ALIGN * ALIGN)[None, :] < columns[:, None]
            pixel = images + ((y0 * row)[:, None] + x)
            dy = y0.to(tl.float32) - cy
            for j in range(most_rows):
                value = profile_x * tl.exp2(factor * dy * dy)[:, None]
                tl.atomic_add(pixel, value, mask=inside & (j < rows)[:, None], sem="relaxed")
                pixel += row
                dy += 1.0


@jit
def _splat_backward(
    centres, amplitudes, widths, rotations, shifts, gradient, d_centres, d_amplitudes, d_widths, count, share, centre_stride,
    amplitude_stride, box, per_px, cut, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of `share` Gaussians of one image. Every lane sums its own columns; only the last sum runs across lanes."""
    programs = tl.cdiv(count, share)
    image = (tl.program_id(0) // programs).to(tl.int64)
    begin = tl.program_id(0) % programs * share
    to_x, to_y = _to_pixels(rotations, shifts, image, box, per_px)
    row = box // ALIGN * ALIGN  # equals box, and tells the compiler that rows are aligned
    centres += image * centre_stride
    amplitudes += image * amplitude_stride
    gradient += image * row * row
    d_centres += image * count * 3
    d_amplitudes += image * count
    d_widths += image * count
    for start in range(begin, min(begin + share, count), GROUP):
        n = start + tl.arange(0, GROUP)
        known = n < count
        cx, cy, amplitude, width, factor = _load_gaussians(centres, amplitudes, widths, n, known, to_x, to_y, per_px)
        reach = cut * per_px * width + 0.5
        x0, columns = _window(cx, reach, known, box, ALIGN)
        y0, rows = _window(cy, reach, known, box, 1)
        m0 = tl.zeros((GROUP, LANES), tl.float32)
        mx, my, m2 = m0, m0, m0
        most_rows = tl.max(rows)
        for block in range(0, tl.max(columns), LANES):
            i = block + tl.arange(0, LANES)
            x = x0[:, None] + i[None, :]
            dx = x.to(tl.float32) - cx[:, None]
            profile_x = tl.exp2(factor[:, None] * dx * dx)
            inside = (i // ALIGN * ALIGN)[None, :] < columns[:, None]
            pixel = gradient + ((y0 * row)[:, None] + x)
            dy = y0.to(tl.float32) - cy
            column_0 = tl.zeros((GROUP, LANES), tl.float32)
            column_1, column_2 = column_0, column_0
            for j in range(most_rows):
                value = tl.load(pixel, mask=inside & (j < rows)[:, None], other=0.0)
                profile_y = tl.exp2(factor * dy * dy)
                column_0 += profile_y[:, None] * value
                column_1 += (profile_y * dy)[:, None] * value
                column_2 += (profile_y * dy * dy)[:, None] * value
                pixel += row
                dy += 1.0
            m0 += profile_x * column_0
            mx += profile_x * dx * column_0
            my += profile_x * column_1
            m2 += profile_x * (dx * dx * column_0 + column_2)
        m0, mx, my, m2 = tl.sum(m0, 1), tl.sum(mx, 1), tl.sum(my, 1), tl.sum(m2, 1)
        _store_gradients(
            d_centres, d_amplitudes, d_widths, n, known, to_x, to_y, per_px, amplitude, width, m0, mx, my, m2
        )  # fmt: skip


# ---- dense sum


@jit
def _dense_forward(
    centres, amplitudes, widths, rotations, shifts, largest, images, batch, count, share, centre_stride, amplitude_stride,
    box, per_px, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one image, summed over `share` Gaussians, BLOCK at a time, into images [parts, B, box, box]."""
    tiles = tl.cdiv(box, TILE)
    tile = tl.program_id(0) % (tiles * tiles)
    plane = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)  # one image of one part
    image = plane % batch
    begin = (plane // batch).to(tl.int32) * share
    to_x, to_y = _to_pixels(rotations, shifts, image, box, per_px)
    centres += image * centre_stride
    amplitudes += image * amplitude_stride
    y = tile // tiles * TILE + tl.arange(0, TILE)
    x = tile % tiles * TILE + tl.arange(0, TILE)
    scale = 2.0**HEADROOM / tl.load(largest)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(begin, min(begin + share, count), BLOCK):
        n = start + tl.arange(0, BLOCK)
        known = n < count
        cx, cy, amplitude, width, factor = _load_gaussians(centres, amplitudes, widths, n, known, to_x, to_y, per_px)
        dy = y.to(tl.float32)[:, None] - cy[None, :]
        dx = x.to(tl.float32)[:, None] - cx[None, :]
        profile_y = (amplitude * width * ROOT_2PI * scale)[None, :] * tl.exp2(factor[None, :] * dy * dy)
        profile_x = tl.exp2(factor[None, :] * dx * dx + HEADROOM)
        sums = tl.dot(profile_y.to(tl.float16), tl.trans(profile_x.to(tl.float16)), sums)
    pixel = images + plane * box * box + (y[:, None] * box + x[None, :])
    unscale = tl.load(largest) * 2.0 ** (-2 * HEADROOM)
    tl.store(pixel, sums * unscale, mask=(y < box)[:, None] & (x < box)[None, :])


@jit
def _moments_across(
    gradient, along_step, across_step, extent, along_centre, across_centre, factor,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ g G (1, d, d²) with d the distance in one direction; sums in the other direction are a matrix product."""
    m0 = tl.zeros((BLOCK,), tl.float32)
    m1, m2 = m0, m0
    for begin in range(0, extent, ACROSS):
        across = begin + tl.arange(0, ACROSS)
        sums = tl.zeros((BLOCK, ACROSS), tl.float32)
        for start in range(0, extent, ALONG):
            along = start + tl.arange(0, ALONG)
            distance = along.to(tl.float32)[None, :] - along_centre[:, None]
            profile = tl.exp2(factor[:, None] * distance * distance + HEADROOM)
            values = tl.load(gradient + (along[:, None] * along_step + across[None, :] * across_step))
            sums = tl.dot(profile.to(tl.float16), values, sums)
        distance = across.to(tl.float32)[None, :] - across_centre[:, None]
        sums *= tl.exp2(factor[:, None] * distance * distance)
        m0 += tl.sum(sums, 1)
        sums *= distance
        m1 += tl.sum(sums, 1)
        m2 += tl.sum(sums * distance, 1)
    return m0, m1, m2


@jit
def _dense_backward(
    centres, amplitudes, widths, rotations, shifts, largest, gradient, d_centres, d_amplitudes, d_widths, count,
    centre_stride, amplitude_stride, box, tiles, per_px, ALONG: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK Gaussians of one image; `gradient` is scaled, in half precision and padded to whole tiles."""
    blocks = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    known = n < count
    to_x, to_y = _to_pixels(rotations, shifts, image, box, per_px)
    centres += image * centre_stride
    amplitudes += image * amplitude_stride
    cx, cy, amplitude, width, factor = _load_gaussians(centres, amplitudes, widths, n, known, to_x, to_y, per_px)
    extent = tiles * ACROSS
    gradient += image * extent * extent
    m0, mx, mxx = _moments_across(gradient, extent, 1, extent, cy, cx, factor, ALONG, ACROSS, BLOCK)
    _, my, myy = _moments_across(gradient, 1, extent, extent, cx, cy, factor, ALONG, ACROSS, BLOCK)
    unscale = tl.load(largest) * 2.0 ** (-2 * HEADROOM)
    d_centres += image * count * 3
    d_amplitudes += image * count
    d_widths += image * count
    _store_gradients(
        d_centres, d_amplitudes, d_widths, n, known, to_x, to_y, per_px, amplitude, width,
        m0 * unscale, mx * unscale, my * unscale, (mxx + myy) * unscale,
    )  # fmt: skip


# ---- calls

WARPS_ENOUGH = 16384
"""Programs of the splat before one takes more than one group: about four to every place for a warp on a large GPU."""
TILES_ENOUGH = 528
"""Programs of the dense forward before images are not split over Gaussians: four to every processor of a large GPU."""
BLOCK = 64
"""Gaussians of one matrix product."""
TINY = 1e-30
"""Replaces a largest value of zero, which nothing can be divided by."""


def splat_forward(
    centres: Tensor,
    amplitudes: Tensor,
    widths: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    box: int,
    pixel_size: float,
    cut: float,
) -> Tensor:
    """Images [B, box, box] of Gaussians that end `cut` standard deviations and half a pixel from their centre, or beyond."""
    batch, count = len(rotations), len(widths)
    images = centres.new_zeros(batch, box, box)
    if batch and count:
        group = 16 if _adds_quads(images) else 4
        share = _share(batch * count, group)
        with torch.cuda.device_of(images):
            _splat_forward[(batch * _pieces(count, share),)](
                centres, amplitudes, widths, rotations, shifts, images, count, share, *_strides(centres, amplitudes), box,
                1 / pixel_size, cut, GROUP=group, ALIGN=_alignment(box), num_warps=1,
            )  # fmt: skip
    return images


def splat_backward(
    centres: Tensor,
    amplitudes: Tensor,
    widths: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    pixel_size: float,
    cut: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [B, N, 3], [B, N], [B, N] of centres, amplitudes and widths from that of the images, [B, box, box]."""
    batch, box, count = len(rotations), gradient.shape[-1], len(widths)
    gradients = _empty_gradients(gradient, count)
    if batch and count:
        share = _share(batch * count, 16)
        with torch.cuda.device_of(gradient):
            _splat_backward[(batch * _pieces(count, share),)](
                centres, amplitudes, widths, rotations, shifts, gradient, *gradients, count, share,
                *_strides(centres, amplitudes), box, 1 / pixel_size, cut, GROUP=16, ALIGN=_alignment(box), num_warps=1,
            )  # fmt: skip
    return gradients


def dense_forward(
    centres: Tensor, amplitudes: Tensor, widths: Tensor, rotations: Tensor, shifts: Tensor, box: int, pixel_size: float
) -> Tensor:
    """Images [B, box, box] of Gaussians summed to the edge of the box, in half precision: errors near 3e-4."""
    batch, count = len(rotations), len(widths)
    if not batch or not count:
        return centres.new_zeros(batch, box, box)
    tile = _tile(box)
    planes = batch * _pieces(box, tile) ** 2
    parts = min(_pieces(TILES_ENOUGH, planes), _pieces(count, 4 * BLOCK))
    share = _pieces(count, parts * BLOCK) * BLOCK
    parts = _pieces(count, share)
    images = centres.new_empty(parts, batch, box, box)
    largest = (_largest(amplitudes) * widths.max() * math.sqrt(2 * math.pi)).clamp_min(TINY)
    with torch.cuda.device_of(images):
        _dense_forward[(parts * planes,)](
            centres, amplitudes, widths, rotations, shifts, largest, images, batch, count, share,
            *_strides(centres, amplitudes), box, 1 / pixel_size, TILE=tile, BLOCK=BLOCK, num_warps=tile // 16, num_stages=1,
        )  # fmt: skip
    return images.sum(0) if parts > 1 else images[0]


def dense_backward(
    centres: Tensor,
    amplitudes: Tensor,
    widths: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    pixel_size: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `splat_backward`, of the dense sum, in half precision: errors near 5e-4."""
    batch, box, count = len(rotations), gradient.shape[-1], len(widths)
    gradients = _empty_gradients(gradient, count)
    if not batch or not count:
        return gradients
    tile = _tile(box)
    tiles = _pieces(box, tile)
    largest = _largest(gradient).clamp_min(TINY)
    halves = (gradient * (2**HEADROOM.value / largest)).half()
    halves = torch.nn.functional.pad(halves, (0, tiles * tile - box) * 2)
    with torch.cuda.device_of(gradient):
        _dense_backward[(batch * _pieces(count, BLOCK),)](
            centres, amplitudes, widths, rotations, shifts, largest, halves, *gradients, count,
            *_strides(centres, amplitudes), box, tiles, 1 / pixel_size, ALONG=tile // 2, ACROSS=tile, BLOCK=BLOCK,
            num_warps=tile // 16, num_stages=1,
        )  # fmt: skip
    return gradients


def _pieces(total: int, size: int) -> int:
    """Pieces of a size that make the total, the last one filled up."""
    return -(-total // size)


def _share(pairs: int, group: int) -> int:
    """Gaussians of one program: one group, and up to eight where there are programs enough."""
    return group * min(max(pairs // (group * WARPS_ENOUGH), 1), 8)


def _alignment(box: int) -> int:
    """Pixels that a window begins at a multiple of: a sector, a 16-byte access, or one."""
    return next(pixels for pixels in (8, 4, 1) if box % pixels == 0)


def _adds_quads(images: Tensor) -> bool:
    """Whether four neighbours are added at once: sm_90 on, rows aligned (Triton's interpreter counts as new)."""
    new = not images.is_cuda or torch.cuda.get_device_capability(images.device) >= (9, 0)
    return new and _alignment(images.shape[-1]) > 1


def _tile(box: int) -> int:
    """Edge of the tiles of the dense sum."""
    return 64 if box <= 64 else 128


def _strides(centres: Tensor, amplitudes: Tensor) -> tuple[int, int]:
    """Steps from one image to the next: 0 for what all images share."""
    return centres.stride(0) * (len(centres) > 1), amplitudes.stride(0) * (len(amplitudes) > 1)


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value, left on the device."""
    return torch.linalg.vector_norm(values, math.inf)


def _empty_gradients(gradient: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(gradient)
    return gradient.new_empty(batch, count, 3), gradient.new_empty(batch, count), gradient.new_empty(batch, count)
