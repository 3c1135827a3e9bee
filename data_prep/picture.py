"""One page on what a store's particles look like: does the contrast, the CTF and every pose convention fit the images?

Called by `checks.inspect_store`. Particles seen from nearly the same direction are phase-flipped, moved and turned by
their poses and averaged: averages that show a sharp molecule prove the metadata, blurred ones disprove it.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import fft
from numpy.typing import NDArray
from scipy import ndimage

from spire_dist.data.store import ParticleStore
from spire_dist.files import replacing
from spire_dist.progress import progress

COLUMNS = 8
IMAGES_PER_AVERAGE = 100
WIDEST_GROUP_DEG = 12.0
LOWPASS_A = 20.0


def draw_picture(particles: ParticleStore, path: Path) -> None:
    """Write the page as a PNG: single particles, class-like averages, defocus, power, shifts, viewing directions."""
    rows, groups = viewing_groups(particles) if particles.has_poses else (_spread(particles.count), [])
    singles = particles.read(rows)
    lowpass_a = max(LOWPASS_A, 4 * particles.pixel_size)
    flipped = phase_flip(singles, particles.ctf[rows], particles.pixel_size)
    strips = [("as stored", singles)]
    strips.append((f"phase-flipped, to {lowpass_a:.0f} Å", lowpass(flipped, lowpass_a / particles.pixel_size)))
    if groups:
        averages = [average_view(particles, group) for group in progress(groups, "averages")]
        strips.append((f"mean of the particles within {WIDEST_GROUP_DEG:.0f}° of this view", np.stack(averages)))

    figure = Figure(figsize=(13, 2.1 * len(strips) + 3.2), layout="constrained")
    figure.suptitle(
        f"{particles.path.name}: {particles.count} particles, {particles.box} px at {particles.pixel_size:.4g} Å/px"
    )
    heights = [*(2.1 for _ in strips), 3.2]
    *bands, plots = np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights)))
    for band, (title, images) in zip(bands, strips, strict=True):
        band.suptitle(title, fontsize=9, x=0.01, ha="left")
        for axes, image in zip(band.subplots(1, COLUMNS), [*images, *[None] * (COLUMNS - len(images))], strict=True):
            _draw_image(axes, image)
    places = plots.add_gridspec(1, 4, width_ratios=(1, 1, 1, 1.5))
    _draw_defocus(plots.add_subplot(places[0]), particles)
    _draw_power(plots.add_subplot(places[1]), particles)
    if particles.has_poses:
        _draw_shifts(plots.add_subplot(places[2]), particles)
        _draw_directions(plots.add_subplot(places[3], projection="mollweide"), particles)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def viewing_groups(particles: ParticleStore) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Up to eight particles that look at the molecule from different sides, and the rows that look as they do.

    The direction of view is the image's z axis in the molecule's frame, the last row of R. Each next reference is the
    direction farthest from the ones before, among the half of all particles that have the most company.
    """
    directions = particles.rotations[:, 2]
    sample = directions[_spread(particles.count, 4000)]
    close = np.cos(np.deg2rad(WIDEST_GROUP_DEG))
    company = np.array([(sample @ direction > close).sum() for direction in sample])
    candidates = _spread(particles.count, 4000)[company >= np.median(company)]
    chosen = [int(candidates[0])]
    for _ in range(min(COLUMNS, len(candidates)) - 1):
        nearest = (directions[candidates] @ directions[chosen].T).max(axis=1)
        chosen.append(int(candidates[np.argmin(nearest)]))
    groups = []
    for row in chosen:
        cosine = directions @ directions[row]
        nearest_rows = np.argsort(-cosine, kind="stable")[:IMAGES_PER_AVERAGE]
        groups.append(nearest_rows[cosine[nearest_rows] >= close])
    return np.array(chosen), groups


def average_view(particles: ParticleStore, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean [D, D] of `rows` after phase flip, shift and in-plane turn onto the first of them."""
    images = phase_flip(particles.read(rows), particles.ctf[rows], particles.pixel_size)
    reference = particles.rotations[rows[0]].astype(np.float64)
    centre = particles.box // 2
    total = np.zeros(images.shape[1:])
    for image, row in zip(images, rows, strict=True):
        turn = particles.rotations[row].astype(np.float64) @ reference.T  # nearly a turn about z
        angle = np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
        # A point at q in the reference is at turn @ q + t in this image; arrays are indexed [y, x].
        matrix_yx = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        offset_yx = centre + particles.shifts[row, ::-1] / particles.pixel_size - matrix_yx @ (centre, centre)
        total += ndimage.affine_transform(image, matrix_yx, offset=tuple(offset_yx), order=1, mode="nearest")  # type: ignore
    return (total / len(rows)).astype(np.float32)


def contrast_transfer(ctf: NDArray[np.float32], box: int, pixel_size: float) -> NDArray[np.float64]:
    """CTF [n, D, D // 2 + 1] of rows `ctf` [n, 9]; the formula of `spire_dist.physics.ctf`, here without torch."""
    columns = np.asarray(ctf, dtype=np.float64).T[:, :, None, None]
    u_a, v_a, angle_deg, kv, cs_mm, amplitude, phase_deg, b_a2, scale = columns
    y, x = fft.fftfreq(box, pixel_size)[:, None], fft.rfftfreq(box, pixel_size)[None, :]
    s2 = x**2 + y**2
    volts = 1e3 * kv
    wavelength_a = 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)
    defocus_a = (u_a + v_a + (u_a - v_a) * np.cos(2 * (np.arctan2(y, x) - np.deg2rad(angle_deg)))) / 2
    chi = np.pi * wavelength_a * defocus_a * s2 - np.pi / 2 * 1e7 * cs_mm * wavelength_a**3 * s2**2
    chi = chi + np.deg2rad(phase_deg)
    return scale * (np.sqrt(1 - amplitude**2) * np.sin(chi) + amplitude * np.cos(chi)) * np.exp(-b_a2 * s2 / 4)


def phase_flip(images: NDArray[np.float32], ctf: NDArray[np.float32], pixel_size: float) -> NDArray[np.float32]:
    """Images [n, D, D] with the sign of their CTF undone."""
    box = images.shape[-1]
    spectra = fft.rfft2(images) * np.sign(contrast_transfer(ctf, box, pixel_size))
    return np.asarray(fft.irfft2(spectra, s=(box, box)), dtype=np.float32)


def lowpass(images: NDArray[np.float32], resolution_px: float) -> NDArray[np.float32]:
    """Images [n, D, D] through a Gaussian that is 1/e at a period of `resolution_px` pixels."""
    box = images.shape[-1]
    s2 = fft.fftfreq(box)[:, None] ** 2 + fft.rfftfreq(box)[None, :] ** 2
    return np.asarray(fft.irfft2(fft.rfft2(images) * np.exp(-s2 * resolution_px**2), s=(box, box)), dtype=np.float32)


def _spread(count: int, most: int = COLUMNS) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _draw_image(axes: Axes, image: NDArray[np.float32] | None) -> None:
    if image is None:
        axes.set_axis_off()
        return
    low, high = np.percentile(image, (0.5, 99.7))
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_defocus(axes: Axes, particles: ParticleStore) -> None:
    defocus_um = particles.ctf[:, :2].mean(axis=1) / 1e4
    bins = np.linspace(defocus_um.min() - 0.02, defocus_um.max() + 0.02, 41)
    groups = particles.attributes["optics_groups"]
    for i, group in enumerate(groups):
        axes.hist(defocus_um[particles.optics_group == i], bins=bins, histtype="step", label=group["name"])
    axes.set(title="defocus", xlabel="µm", ylabel="particles")
    if len(groups) > 1:
        axes.legend(fontsize=6)


def _draw_power(axes: Axes, particles: ParticleStore) -> None:
    """Radial power; flat at 1 where only normalised white noise is left."""
    images = particles.read(_spread(particles.count, 200))
    box = particles.box
    power = (np.abs(fft.fft2(images)) ** 2).mean(axis=0) / box**2
    radius = np.rint(np.hypot(fft.fftfreq(box)[:, None], fft.fftfreq(box)[None, :]) * box).astype(int)
    shells = np.arange(1, box // 2)
    axes.plot(shells / (box * particles.pixel_size), ndimage.mean(power, radius, shells))
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.set(title="power (background σ² = 1)", xlabel="1/Å", yscale="log")


def _draw_shifts(axes: Axes, particles: ParticleStore) -> None:
    x_a, y_a = particles.shifts.T
    reach_a = max(1.0, 1.05 * float(np.abs(particles.shifts).max()))
    axes.hist2d(x_a, y_a, bins=40, range=[[-reach_a, reach_a]] * 2, cmap="viridis")
    axes.set(title="shifts", xlabel="x (Å)", ylabel="y (Å)", aspect="equal")


def _draw_directions(axes: Axes, particles: ParticleStore) -> None:
    """Density of viewing directions over the sphere, in cells of equal area."""
    x, y, z = particles.rotations[:, 2].T
    counts, longitude, sine = np.histogram2d(np.arctan2(y, x), z, bins=(36, 18), range=[[-np.pi, np.pi], [-1, 1]])
    mesh = axes.pcolormesh(longitude, np.arcsin(sine), counts.T, cmap="viridis")
    axes.figure.colorbar(mesh, ax=axes, shrink=0.6, label="particles per cell")
    axes.set_title("viewing directions")
    axes.set_xticklabels([])
    axes.set_yticklabels([])
