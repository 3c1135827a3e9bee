"""Pictures of a run that still trains, from its last checkpoint: its latents, and central sections of maps along them.

Called in a process of its own by `painter.py`. Cost is bounded whatever the run's size: a sample of the latents, no more
than `SIDE` pixels, and sections are summed as they are, without the map around them.
"""

import io
from pathlib import Path

import mrcfile
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cluster.drawn import MapRow, Pictures
from spire_dist.config import RunConfig, load_config
from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.errors import RunError
from spire_dist.model.mixtures import Mixture
from spire_dist.physics.projector import splat_dense
from spire_dist.results import plots
from spire_dist.results.latent_paths import principal
from spire_dist.training.saving import STEPS_PER_STAGE, State, encoder_from_state, mixture_from_state, read_state

SAMPLE = 20_000
"""Latents that are looked at."""
ENCODED = 1024
"""Images that are read for it where an encoder makes the latents."""
SIDE = 192
"""Pixels of a section, at most and about."""
PLACES = {"A": 0.05, "B": 0.5, "C": 0.95}
"""Where along the first principal axis maps are shown, as shares of the particles before it."""
MASS_INSIDE = 0.995
BLACK_AND_WHITE = (0.5, 99.7)
"""Percentiles of the sections."""
SMALL_BATCH = 256
DENSITY = LinearSegmentedColormap.from_list("density", [plots.BLUE, "#9d6bd6", plots.RED, plots.ORANGE])
"""All of one lightness, to be seen on a light page and on a dark one."""
LABELS = LinearSegmentedColormap.from_list("labels", colormaps["turbo"](np.linspace(0.1, 0.9, 256)))
"""Without the ends, which cannot be seen on a dark page."""


def draw(run: Path) -> Pictures:
    """The pictures of a run's last checkpoint. Raises RunError where there is none, or where it is damaged."""
    torch.set_num_threads(1)
    config = load_config(run / "config.toml")
    state = read_state(run)
    if state is None:
        raise RunError(f"{run}: no checkpoint yet")
    name = f"step-{state.stage * STEPS_PER_STAGE + state.step:08d}"
    store = ParticleStore.open(config.data.store)
    rows, latents = _latents(run, state, store, config)
    mixture = mixture_from_state(state, config).eval()
    found = principal(latents)
    along = found.coordinates(latents, min(2, latents.shape[1]))
    places = {letter: _place(along, share) for letter, share in PLACES.items()}
    label = None if store.label is None else store.label[rows]
    half, maps = _maps(run, mixture, latents[list(places.values())], list(places), store.box)
    return Pictures(
        checkpoint=name,
        stage=state.stage,
        step=state.step,
        saved=(run / "checkpoints" / name / "COMMIT").stat().st_mtime,
        scatter=_scatter(along, label, places) if along.shape[1] > 1 else None,
        share=tuple(float(v) for v in found.variances[:2] / max(found.variances.sum(), 1e-12)),
        particles=store.count,
        shown=len(rows),
        labels=None if label is None else len(np.unique(label)),
        maps=maps,
        side_a=2 * half * store.pixel_size,
    )


def _latents(run: Path, state: State, store: ParticleStore, config: RunConfig) -> tuple[NDArray, NDArray]:
    """Rows of the store, and their latents [n, L]: a sample, the same each time."""
    ended, encoded = (run / "latents.npy").exists(), state.latents is None
    order = np.random.default_rng(0).permutation(store.count)
    rows = np.sort(order[: ENCODED if encoded and not ended else SAMPLE])
    if ended:
        return rows, np.load(run / "latents.npy", mmap_mode="r")[rows]
    if state.latents is not None:
        return rows, state.latents[torch.from_numpy(rows), 0].numpy()
    encoder, source = encoder_from_state(state, store.box, config).eval(), BatchSource(store)
    pieces = []
    with torch.no_grad():
        for start in range(0, len(rows), SMALL_BATCH):
            batch = source.batch(rows[start : start + SMALL_BATCH])
            pieces.append(encoder(batch.images, batch.ctf, batch.rotations, batch.shifts_px).numpy())
    return rows, np.concatenate(pieces)


def _place(along: NDArray, share: float) -> int:
    """The particle that has the most typical latent among those at a place along the first axis: maps are of particles."""
    order = np.argsort(along[:, 0], kind="stable")
    middle, reach = round(share * (len(order) - 1)), max(1, len(order) // 50)
    near = order[max(0, middle - reach) : middle + reach + 1]
    return int(near[np.abs(along[near] - np.median(along[near], axis=0)).sum(axis=1).argmin()])


def _scatter(along: NDArray, label: NDArray | None, places: dict[str, int]) -> bytes:
    """Points [n, 2] on nothing, coloured by label [n] or by how many are near, with the places of the maps."""
    spans = [_with_margin(*_between(along[:, axis], 0.2, 99.8)) for axis in range(2)]
    if label is None:
        bins = int(np.clip(np.sqrt(len(along)), 12, 80))
        counts, *edges = np.histogram2d(*along.T, bins=bins, range=spans)
        cells = [np.clip(np.digitize(along[:, axis], edges[axis]) - 1, 0, bins - 1) for axis in range(2)]
        colour, cmap = np.log1p(counts[cells[0], cells[1]]), DENSITY
    else:
        colour, cmap = np.unique(label, return_inverse=True)[1], LABELS
    canvas = Figure(figsize=(4, 4), dpi=180)
    axes = canvas.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=spans[0], ylim=spans[1])
    order = np.argsort(colour, kind="stable") if label is None else slice(None)
    size = float(np.clip(30_000 / len(along), 3, 18))
    axes.scatter(*along[order].T, c=colour[order], cmap=cmap, s=size, alpha=0.75, linewidths=0)
    for letter, row in places.items():
        x, y = (float(value) for value in along[row])
        axes.plot(x, y, "o", markersize=15, color="#1b2129", markeredgecolor="white", markeredgewidth=1.4)
        axes.text(x, y, letter, color="white", ha="center", va="center_baseline", fontsize=9, fontweight="bold")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _with_margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) + 1e-6
    return low - margin, high + margin


@torch.no_grad()
def _maps(run: Path, mixture: Mixture, latents: NDArray, names: list[str], box: int) -> tuple[int, tuple[MapRow, ...]]:
    """Half the side of all sections, px of the store, and the rows: the consensus, and the model at latents [K, L]."""
    widths = mixture.gaussians.widths_px()
    models = [mixture.deform(torch.from_numpy(np.ascontiguousarray(z[None], np.float32))) for z in latents]
    half = max(_radius(centres[0], peaks[0], widths, box) for centres, peaks in models)
    drawn = [_model_sections(centres[0], peaks[0], widths, half) for centres, peaks in models]
    low, high = _between(np.stack(drawn), *BLACK_AND_WHITE)
    rows = [MapRow(name, _png(sections, low, high)) for name, sections in zip(names, drawn, strict=True)]
    path = run / "volumes" / "consensus.mrc"
    if path.exists():
        sections = _map_sections(path, half)
        rows.insert(0, MapRow("consensus", _png(sections, *_between(sections, *BLACK_AND_WHITE))))
    return half, tuple(rows)


def _radius(centres: torch.Tensor, peaks: torch.Tensor, widths: torch.Tensor, box: int) -> int:
    """Pixels from the middle of the box along an axis within which nearly all mass lies."""
    far = (centres.abs().amax(dim=1) + 2 * widths).numpy()
    order = np.argsort(far)
    mass = np.cumsum((peaks.abs() * widths**3).numpy()[order])
    place = np.searchsorted(mass, MASS_INSIDE * mass[-1])
    return int(np.clip(np.ceil(far[order][min(place, len(far) - 1)]), 4, box // 2))


def _model_sections(centres: torch.Tensor, peaks: torch.Tensor, widths: torch.Tensor, half: int) -> NDArray:
    """Sections [3, d, d] of Gaussians through the middle, across z, y and x; 2 `half` px wide."""
    side = int(np.clip(2 * half, 64, SIDE))
    scale = side / (2 * half)
    sections = []
    for across, (column, row) in ((2, (0, 1)), (1, (0, 2)), (0, (1, 2))):
        weights = peaks * torch.exp(-0.5 * (centres[:, across] / widths) ** 2)
        planar = scale * (centres[:, [column, row]] + half + 0.5) - 0.5  # voxel `half` of the window is the middle
        sections.append(splat_dense(planar[None], weights[None], scale * widths, side)[0])
    return torch.stack(sections).numpy()


def _map_sections(path: Path, half: int) -> NDArray:
    """The same of a map's file, of which no more than these planes are read."""
    with mrcfile.mmap(path) as mrc:
        volume = np.asarray(mrc.data)
        middle = len(volume) // 2
        planes = [volume[middle], volume[:, middle], volume[:, :, middle]]
        planes = [np.array(plane, dtype=np.float32) for plane in planes]
    window = slice(middle - half, middle + half)
    side = int(np.clip(2 * half, 64, SIDE))
    resized = [
        Image.fromarray(plane[window, window]).resize((side, side), Image.Resampling.BICUBIC) for plane in planes
    ]
    return np.stack([np.asarray(image) for image in resized])


def _between(values: NDArray, low: float, high: float) -> tuple[float, float]:
    """Two percentiles."""
    return float(np.percentile(values, low)), float(np.percentile(values, high))


def _png(sections: NDArray, low: float, high: float) -> bytes:
    """Side by side, about `SIDE` pixels each."""
    return plots.grey_png(sections, 3, low, high, max(1, round(SIDE / sections.shape[-1])))
