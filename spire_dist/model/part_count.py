"""How many parts the data show, and how firmly each of them is found. Called by `training.stages` between the stages.

For a number k of clusters of weighted points:

- *stability*: points are halved at random, each half is clustered, both clusterings are carried to all points by the nearest
  centroid and compared by the adjusted Rand index (Lange et al. 2004; in the spirit of Ben-Hur et al. 2002). The same is done
  for structureless points, which a long cloud can make stable too.
- *gap*: how much log W, W the inertia within clusters, is below that of structureless points (Tibshirani et al. 2001),
  here points uniform in the box along the principal axes.
- *silhouette* (Rousseeuw 1987), told but not used: it does not know k = 1.

The number chosen is the largest k that is stable and whose gap beats that of all smaller ones; 1 if there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPLITS = 8
"""Random halvings of the Gaussians, for each k."""
REFERENCES = 5
"""Structureless sets beside the data."""
STABLE = 0.8
"""Adjusted Rand index from which a number of clusters counts as found again."""
RESTARTS = 3

Points = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CountMeasures:
    """What was measured for one number of clusters; of k = 1 stability is 1 and the silhouette 0 by convention."""

    count: int
    stability: float
    stability_by_chance: float
    gap: float
    gap_error: float
    silhouette: float


@dataclass(frozen=True, slots=True)
class PartStudy:
    """How the number of parts came about: `by` hand or data, the `measures` of each k tried, and of each part that was found
    its `stability`, the mean Jaccard index at which it is found again.
    """

    by: str
    chosen: int
    measures: list[CountMeasures]
    stability: list[float]


def measure_counts(features: NDArray, weights: NDArray, counts: Sequence[int], seed: int) -> list[CountMeasures]:
    """The measures of each number of clusters of features [N, E] with weights [N] > 0; numbers above N / 4 are left out."""
    points = _principal(features.astype(np.float64), weights)
    rng = np.random.default_rng((seed, 3))
    reference = [rng.uniform(points.min(0), points.max(0), points.shape) for _ in range(REFERENCES)]
    measures = []
    for count in counts:
        if count > max(1, len(points) // 4):
            break
        labels, within = _cluster(points, weights, count, seed)
        found = [_cluster(other, weights, count, seed)[1] for other in reference]
        expected, smallest = np.log(np.maximum(found, 1e-300)), 1e-12 * _inertia(points, weights)
        gap = expected.mean() - np.log(max(within, smallest, 1e-300))
        measures.append(
            CountMeasures(
                count,
                _stability(points, weights, count, SPLITS, seed),
                float(np.mean([_stability(other, weights, count, 1, seed) for other in reference])),
                float(gap),
                float(expected.std() * np.sqrt(1 + 1 / REFERENCES)),
                silhouette(points, weights, labels),
            )
        )
    return measures


def choose_count(measures: Sequence[CountMeasures]) -> int:
    """The largest k that is stable, more so than structureless points, and whose gap less its error beats all smaller ones'."""
    chosen, highest = 1, measures[0].gap
    for m in measures[1:]:
        if m.stability >= STABLE and m.stability > m.stability_by_chance and m.gap - m.gap_error > highest:
            chosen = m.count
        highest = max(highest, m.gap)
    return chosen


def part_stability(features: NDArray, weights: NDArray, cluster: Labels, seed: int) -> list[float]:
    """For each cluster of `cluster` [N], the mean over clusterings of random halves of its best weighted Jaccard index there
    (Hennig 2007): 1 is found again always; above 0.75 is commonly called stable, below 0.5 dissolved.
    """
    points, count = _principal(features.astype(np.float64), weights), int(cluster.max()) + 1
    found = []
    for labels in (one for pair in _halves(points, weights, count, SPLITS, seed) for one in pair):
        shared = _table(cluster, labels, weights)
        union = shared.sum(1, keepdims=True) + shared.sum(0) - shared
        found.append((shared / np.maximum(union, 1e-300)).max(1))
    return np.mean(found, axis=0).tolist()


def weighted_rand(first: Labels, second: Labels, weights: NDArray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985), a point of weight w (mean 1) counted as w points."""
    table = _table(first, second, weights * (len(weights) / weights.sum()))

    def pairs(numbers: NDArray) -> float:
        return float((numbers * (numbers - 1)).sum() / 2)

    both, rows, columns, total = (pairs(n) for n in (table, table.sum(1), table.sum(0), table.sum()))
    expected, most = rows * columns / max(total, 1e-300), (rows + columns) / 2
    return 1.0 if abs(most - expected) < 1e-9 * max(abs(most), 1e-300) else (both - expected) / (most - expected)


def silhouette(points: Points, weights: NDArray, labels: Labels) -> float:
    """Weighted mean silhouette of points [N, E]; the distances are averaged by weight too."""
    count = int(labels.max()) + 1
    if count == 1:
        return 0.0
    from scipy.spatial.distance import cdist

    member = np.eye(count)[labels] * weights[:, None]
    totals, mass, rows = cdist(points, points) @ member, member.sum(0), np.arange(len(points))
    alone = np.bincount(labels)[labels] == 1
    inner = totals[rows, labels] / np.where(alone, 1, mass[labels] - weights)
    others = totals / mass
    others[rows, labels] = np.inf
    outer = others.min(1)
    values = np.where(alone, 0, (outer - inner) / np.maximum(np.maximum(outer, inner), 1e-300))
    return float(np.average(values, weights=weights))


def _stability(points: Points, weights: NDArray, count: int, splits: int, seed: int) -> float:
    if count == 1:
        return 1.0
    pairs = _halves(points, weights, count, splits, seed)
    return float(np.mean([weighted_rand(first, second, weights) for first, second in pairs]))


def _halves(points: Points, weights: NDArray, count: int, splits: int, seed: int) -> list[tuple[Labels, Labels]]:
    """Labels of all points by clusterings of two random halves, `splits` times."""
    if count == 1 or len(points) < 2 * count:
        whole = _cluster(points, weights, count, seed)[0]
        return [(whole, whole)] * splits
    rng = np.random.default_rng((seed, 4))
    orders = [rng.permutation(len(points)) for _ in range(splits)]
    middle = len(points) // 2
    return [
        tuple(_fit(points[half], weights[half], count, seed).predict(points) for half in (o[:middle], o[middle:]))
        for o in orders
    ]  # pyright: ignore[reportReturnType]


def _fit(points: Points, weights: NDArray, count: int, seed: int):
    from sklearn.cluster import KMeans  # takes a second to load, and a run needs it once

    means = KMeans(count, init="k-means++", n_init=RESTARTS, random_state=seed)  # pyright: ignore[reportArgumentType]
    return means.fit(points, sample_weight=weights)


def _cluster(points: Points, weights: NDArray, count: int, seed: int) -> tuple[Labels, float]:
    """Labels without gaps, and the inertia within clusters."""
    if count == 1:
        return np.zeros(len(points), dtype=np.int64), _inertia(points, weights)
    means = _fit(points, weights, count, seed)
    assert means.labels_ is not None
    assert means.inertia_ is not None
    return np.unique(means.labels_, return_inverse=True)[1], float(means.inertia_)


def _inertia(points: Points, weights: NDArray) -> float:
    middle = np.average(points, axis=0, weights=weights)
    return float((weights[:, None] * (points - middle) ** 2).sum())


def _principal(points: Points, weights: NDArray) -> Points:
    """Coordinates along the principal axes; those along which nothing varies are left out, distances stay."""
    centred = points - np.average(points, axis=0, weights=weights)
    _, spread, axes = np.linalg.svd(centred * np.sqrt(weights / weights.sum())[:, None], full_matrices=False)
    used = max(1, int((spread > 1e-5 * spread[0]).sum()))
    return centred @ axes[:used].T


def _table(first: Labels, second: Labels, weights: NDArray) -> NDArray[np.float64]:
    """Weight that each cluster of `first` shares with each of `second`."""
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first, second), weights)
    return table
