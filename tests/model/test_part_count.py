"""The number of parts, on clusters whose number is known and against scikit-learn."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from spire_dist.model import part_count
from spire_dist.model.part_count import choose_count, measure_counts, part_stability, silhouette, weighted_rand

COUNTS = range(1, 7)


def blobs(count: int, seed: int = 0):
    """240 points in clusters of unequal size, far apart, and their weights."""
    rng = np.random.default_rng(seed)
    shares = np.arange(2, count + 2) / np.arange(2, count + 2).sum()
    truth = np.sort(np.searchsorted(np.cumsum(shares)[:-1], np.arange(240) / 240, side="right"))
    points = 4 * np.eye(6)[truth] + 0.4 * rng.normal(size=(240, 6))
    return points, rng.uniform(0.5, 1.5, 240), truth


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_planted_clusters_are_counted_and_a_single_blob_is_one(count):
    points, weights, truth = blobs(count)
    measures = measure_counts(points, weights, COUNTS, seed=0)
    assert choose_count(measures) == count
    assert measures[count - 1].stability > 0.99
    assert min(part_stability(points, weights, truth, seed=0)) > 0.99


def test_a_long_cloud_without_clusters_is_one_although_halves_agree_on_it():
    points = np.random.default_rng(0).normal(size=(240, 4)) * [10, 1, 1, 1]
    measures = measure_counts(points, np.ones(240), COUNTS, seed=0)
    assert measures[1].stability > part_count.STABLE
    assert choose_count(measures) == 1


def test_features_that_are_all_the_same_are_one_part():
    with pytest.warns(match="Number of distinct clusters"):
        assert choose_count(measure_counts(np.ones((60, 4)), np.ones(60), COUNTS, seed=0)) == 1


def test_a_part_that_is_no_cluster_is_told_from_those_that_are():
    points, weights, truth = blobs(3)
    torn = np.where(truth == 2, 2 + np.random.default_rng(1).integers(0, 2, 240), truth)
    stability = part_stability(points, weights, torn, seed=0)
    assert max(stability[2:]) < 0.7 < min(stability[:2])


def test_the_gap_is_that_of_a_direct_computation():
    points, weights, _ = blobs(3)
    measures = measure_counts(points, weights, [1, 2, 3], seed=5)
    rng = np.random.default_rng((5, 3))
    box = part_count._principal(points, weights)
    reference = [rng.uniform(box.min(0), box.max(0), box.shape) for _ in range(part_count.REFERENCES)]

    def log_within(x, k):
        labels = KMeans(k, n_init=20, random_state=1).fit_predict(x, sample_weight=weights)
        total = 0.0
        for c in range(k):  # from pairs, Tibshirani's equation 2
            own, w = x[labels == c], weights[labels == c]
            total += (np.outer(w, w) * ((own[:, None] - own) ** 2).sum(-1)).sum() / (2 * w.sum())
        return np.log(total)

    for m in measures:
        expected = np.mean([log_within(r, m.count) for r in reference]) - log_within(points, m.count)
        assert m.gap == pytest.approx(expected, abs=0.01)


def test_silhouette_and_rand_index_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    points, first, second = rng.normal(size=(80, 3)), rng.integers(0, 4, 80), rng.integers(0, 3, 80)
    first[first == 3] = 2
    first[0] = 3  # alone in its cluster
    assert silhouette(points, np.ones(80), first) == pytest.approx(silhouette_score(points, first))
    assert weighted_rand(first, second, np.full(80, 7.0)) == pytest.approx(adjusted_rand_score(first, second))
    near = np.where(rng.random(80) < 0.8, first, second)
    assert weighted_rand(first, near, np.ones(80)) == pytest.approx(adjusted_rand_score(first, near))


def test_the_same_seed_measures_the_same():
    points, weights, _ = blobs(2)
    assert measure_counts(points, weights, [2], 4) == measure_counts(points, weights, [2], 4)
