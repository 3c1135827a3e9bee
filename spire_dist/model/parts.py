"""Part discovery: clusters of features are what moves together; split in space they become anchors (paper section 4)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESTARTS = 10


@dataclass(frozen=True, slots=True)
class Parts:
    """Of the N Gaussians of stage 1: `cluster` [N] (level 1), `anchor_of` [N] (level 2), `anchors` [A] the Gaussian that
    each anchor is taken from, the one nearest to the centroid.
    """

    cluster: NDArray[np.int64]
    anchor_of: NDArray[np.int64]
    anchors: NDArray[np.int64]


def discover_parts(
    features: NDArray[np.float32],
    centres: NDArray[np.float32],
    masses: NDArray[np.float32],
    clusters: int,
    anchors: int,
    seed: int,
) -> Parts:
    """k-means++ on features [N, E], then on centres [N, 3] within the clusters that spread furthest.

    Every Gaussian counts by its mass [N], so that switched-off ones do not pull a centroid. `anchors` below `clusters` is
    raised to it; more anchors than Gaussians are not possible.
    """
    clusters = min(clusters, len(features))
    weights = mass_weights(masses)
    cluster = _kmeans(features, weights, clusters, seed)
    clusters = int(cluster.max()) + 1

    pieces = np.ones(clusters, dtype=int)  # level-2 pieces of each cluster
    spread = np.array([_inertia(centres[cluster == c], weights[cluster == c]) for c in range(clusters)])
    sizes = np.bincount(cluster, minlength=clusters)
    for _ in range(min(anchors, len(features)) - clusters):
        # Splitting in k pieces divides the inertia in space by about k^(2/3).
        gain = np.where(pieces < sizes, spread / pieces ** (2 / 3), -1)
        pieces[np.argmax(gain)] += 1

    anchor_of = np.empty(len(features), dtype=np.int64)
    chosen: list[int] = []
    for c in range(clusters):
        members = np.flatnonzero(cluster == c)
        piece = _kmeans(centres[members], weights[members], pieces[c], seed)
        for p in range(int(piece.max()) + 1):
            own = members[piece == p]
            anchor_of[own] = len(chosen)
            middle = np.average(centres[own], axis=0, weights=weights[own])
            chosen.append(int(own[np.argmin(((centres[own] - middle) ** 2).sum(1))]))
    return Parts(cluster, anchor_of, np.array(chosen))


def mass_weights(masses: NDArray[np.float32]) -> NDArray[np.float64]:
    """What a Gaussian counts for: its mass [N], but never quite nothing."""
    return np.maximum(masses, 1e-6 * masses.max()).astype(np.float64)


def _kmeans(points: NDArray[np.float32], weights: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    from sklearn.cluster import KMeans  # takes a second to load, and a run needs it once

    means = KMeans(count, init="k-means++", n_init=RESTARTS, random_state=seed)  # pyright: ignore[reportArgumentType]
    labels = means.fit_predict(points.astype(np.float64), sample_weight=weights)
    return np.unique(labels, return_inverse=True)[1]  # no gaps where fewer points are distinct


def _inertia(points: NDArray[np.float32], weights: NDArray[np.float64]) -> float:
    middle = np.average(points, axis=0, weights=weights)
    return float((weights[:, None] * (points - middle) ** 2).sum())
