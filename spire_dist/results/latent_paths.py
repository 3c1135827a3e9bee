"""Where to look in the latent space: principal axes, a closed loop through the data, cluster centres.

Used by export (maps along a path) and report (the animation); numpy and k-means only. Every function takes latents
[N, L] and returns points [K, L].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from spire_dist.errors import ConfigError, SourceError
from spire_dist.numpy_pickle import load_numbers

Floats = NDArray[np.float32]
LOOP_SAMPLE = 20_000
"""Latents that shape the loop and the cluster centres; more change nothing visible."""


@dataclass(frozen=True)
class Principal:
    """Principal axes of latents: `mean` [L], `axes` [L, L] (rows, largest first), `variances` [L]."""

    mean: NDArray
    axes: NDArray
    variances: NDArray

    def coordinates(self, z: NDArray, count: int = 2) -> NDArray:
        """Latents [K, L] along the first `count` axes, [K, count]."""
        return (z - self.mean) @ self.axes[:count].T


def principal(latents: Floats) -> Principal:
    """Principal axes; each points to where its largest component is positive, for equal pictures."""
    mean = latents.mean(axis=0, dtype=np.float64)
    _, scales, axes = np.linalg.svd(latents - mean, full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    return Principal(mean, axes * signs[:, None], scales**2 / len(latents))


def axis_path(latents: Floats, axis: int, count: int, percentiles: tuple[float, float] = (5, 95)) -> Floats:
    """`count` points on the line through the mean along principal axis `axis` (from 1), between two percentiles of
    the data.

    A straight line: where latents form a ring it crosses the empty middle. `loop_path` does not.
    """
    found = principal(latents)
    if not 1 <= axis <= len(found.axes):
        raise ConfigError(
            f"path: axis-{axis} of {len(found.axes)} latent dimensions; give axis-1 to axis-{len(found.axes)}"
        )
    low, high = np.percentile(found.coordinates(latents, axis)[:, -1], percentiles)
    return (found.mean + np.linspace(low, high, count)[:, None] * found.axes[axis - 1]).astype(np.float32)


def loop_path(latents: Floats, count: int, seed: int = 0) -> Floats:
    """`count` points on a closed curve through the data: a self-organising ring (Kohonen, batch form).

    Each point is a weighted mean of the latents nearest to it and to its neighbours on the ring, while the
    neighbourhood shrinks. A ring of latents is followed around; along a line the loop goes there and back; through
    separate clusters it is a tour. Points between clusters are interpolated: no particle may be there.
    """
    rng = np.random.default_rng(seed)
    data = latents[rng.permutation(len(latents))[:LOOP_SAMPLE]].astype(np.float64)
    nodes = max(count, 12)
    turn = 2 * np.pi * np.arange(nodes) / nodes
    found = principal(latents)
    plane = found.axes[:2] * np.sqrt(found.variances[:2, None])
    ring = found.mean + np.stack([np.cos(turn), np.sin(turn)], axis=1)[:, : len(plane)] @ plane
    steps = np.arange(nodes)
    apart = np.minimum((steps - steps[:, None]) % nodes, (steps[:, None] - steps) % nodes)
    for reach in np.geomspace(nodes / 5, nodes / 14, 40):
        near = np.exp(-0.5 * (apart / reach) ** 2)
        nearest = ((data**2).sum(axis=1)[:, None] - 2 * data @ ring.T + (ring**2).sum(axis=1)).argmin(axis=1)
        members = np.bincount(nearest, minlength=nodes)
        sums = np.zeros_like(ring)
        np.add.at(sums, nearest, data)
        ring = (near @ sums) / np.maximum(near @ members, 1e-9)[:, None]
    return through(ring.astype(np.float32), count, closed=True)


def through(points: Floats, count: int, closed: bool = False) -> Floats:
    """`count` points evenly spaced along the straight pieces between `points` [K, L], back to the first if closed."""
    corners = np.concatenate([points, points[:1]]) if closed else points
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    at = np.linspace(0, length[-1], count, endpoint=not closed)
    return np.stack([np.interp(at, length, column) for column in corners.T], axis=1).astype(np.float32)


def cluster_centres(latents: Floats, count: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """k-means centres [count, L], each moved to the nearest latent that occurs, along a short tour; and its row."""
    if not 1 <= count <= len(latents):
        raise ConfigError(f"clusters: {count} for {len(latents)} particles; give between 1 and that")
    rng = np.random.default_rng(seed)
    sample = latents[rng.permutation(len(latents))[:LOOP_SAMPLE]]
    centres = KMeans(count, random_state=seed).fit(sample).cluster_centers_
    rows = np.array([((latents - centre) ** 2).sum(axis=1).argmin() for centre in centres])
    rows = rows[short_tour(latents[rows])]
    return latents[rows], rows


def short_tour(points: NDArray) -> NDArray[np.int64]:
    """Order of `points` [K, L] along a short closed tour: nearest neighbour, then 2-opt."""
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    tour, left = [0], set(range(1, len(points)))
    while left:
        following = min(left, key=lambda k: distances[tour[-1], k])
        tour.append(following)
        left.remove(following)
    improved = len(tour) > 3
    while improved:
        improved = False
        for i in range(len(tour) - 1):
            for j in range(i + 2, len(tour) - (i == 0)):
                a, b, c, d = tour[i], tour[i + 1], tour[j], tour[(j + 1) % len(tour)]
                if distances[a, c] + distances[b, d] < distances[a, b] + distances[c, d] - 1e-9:
                    tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1]
                    improved = True
    return np.array(tour)


def read_points(path: Path, dimension: int) -> Floats:
    """Latents [K, dimension] from a .npy file or a text table."""
    points = load_numbers(path, axes=2)
    if points.ndim != 2 or points.shape[1] != dimension or not np.isfinite(points).all():
        raise SourceError(f"{path}: shape {points.shape}; latents of this run are finite rows of {dimension} numbers")
    return points.astype(np.float32)


def named_path(latents: Floats, name: str, count: int, seed: int = 0) -> Floats:
    """The path called `loop`, `axis-K`, or through the points of a file, in `count` points."""
    if count < 2:
        raise ConfigError(f"frames: {count}; a path has at least 2")
    if name == "loop":
        return loop_path(latents, count, seed)
    if name.startswith("axis-") and name[5:].isdigit():
        return axis_path(latents, int(name[5:]), count)
    if Path(name).suffix:
        return through(read_points(Path(name), latents.shape[1]), count)
    raise ConfigError(f"path: '{name}' is not known; give loop, axis-1, axis-2, ..., or a file of points (.npy, .txt)")
