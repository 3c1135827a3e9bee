"""Part discovery on clusters whose truth is known."""

import numpy as np
import pytest

from spire_dist.model.parts import discover_parts


@pytest.fixture
def planted():
    """300 Gaussians: features in three clusters; in space the first is one blob, the second a long row, the third small."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], [100, 150, 50]))
    features = (3 * np.eye(8)[truth] + 0.3 * rng.normal(size=(300, 8))).astype(np.float32)
    centres = rng.normal(size=(300, 3)) + np.array([[0, 0, 0], [20, 0, 0], [0, 20, 0]])[truth]
    centres[truth == 1, 2] += rng.uniform(-30, 30, 150)
    return truth, features, centres.astype(np.float32), rng.uniform(0.5, 1, 300).astype(np.float32)


def same_partition(a, b) -> bool:
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def test_planted_clusters_are_found(planted):
    truth, features, centres, masses = planted
    parts = discover_parts(features, centres, masses, clusters=3, anchors=3, seed=0)
    assert same_partition(parts.cluster, truth)
    assert same_partition(parts.anchor_of, truth)


def test_the_cluster_that_spreads_furthest_is_split_first_and_in_space(planted):
    truth, features, centres, masses = planted
    parts = discover_parts(features, centres, masses, clusters=3, anchors=5, seed=0)
    assert same_partition(parts.cluster, truth)
    pieces = [np.unique(parts.anchor_of[truth == c]) for c in range(3)]
    assert [len(p) for p in pieces] == [1, 3, 1]
    assert len(np.unique(np.concatenate(pieces))) == 5  # no anchor is shared by two clusters
    z = centres[:, 2]
    ranges = sorted((z[parts.anchor_of == a].min(), z[parts.anchor_of == a].max()) for a in pieces[1])
    assert all(ranges[i][1] < ranges[i + 1][0] + 2 for i in range(2))


@pytest.mark.parametrize("anchors", [1, 3, 7, 12])
def test_anchors_are_members_of_their_part_and_nearest_to_its_centroid(planted, anchors):
    _, features, centres, masses = planted
    parts = discover_parts(features, centres, masses, clusters=3, anchors=anchors, seed=0)
    assert len(parts.anchors) == max(anchors, 3)
    np.testing.assert_array_equal(parts.anchor_of[parts.anchors], np.arange(len(parts.anchors)))
    for a, anchor in enumerate(parts.anchors):
        own = parts.anchor_of == a
        middle = np.average(centres[own], axis=0, weights=masses[own])
        distances = np.linalg.norm(centres - middle, axis=1)
        assert distances[anchor] == distances[own].min()


def test_gaussians_that_are_switched_off_do_not_pull(planted):
    truth, features, centres, masses = planted
    features = np.concatenate([features, np.full((20, 8), 50, dtype=np.float32)])
    centres = np.concatenate([centres, np.full((20, 3), 40, dtype=np.float32)])
    masses = np.concatenate([masses, np.zeros(20, dtype=np.float32)])
    parts = discover_parts(features, centres, masses, clusters=3, anchors=3, seed=0)
    assert same_partition(parts.cluster[:300], truth)


def test_the_same_seed_gives_the_same_parts(planted):
    _, *inputs = planted
    first, second = (discover_parts(*inputs, clusters=3, anchors=6, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.anchor_of, second.anchor_of)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_gaussians_than_parts_are_parts_of_their_own(count):
    rng = np.random.default_rng(0)
    features, centres = rng.normal(size=(2, count, 3)).astype(np.float32)
    parts = discover_parts(features, centres, np.ones(count, dtype=np.float32), clusters=5, anchors=8, seed=0)
    assert sorted(parts.anchor_of) == list(range(count))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_features_that_are_all_the_same_are_one_part_split_in_space():
    """Nothing moved in stage 1, or the features were not needed."""
    rng = np.random.default_rng(0)
    centres, features = rng.normal(size=(60, 3)).astype(np.float32), np.ones((60, 4), dtype=np.float32)
    parts = discover_parts(features, centres, np.ones(60, dtype=np.float32), clusters=3, anchors=4, seed=0)
    assert len(np.unique(parts.anchor_of)) == len(parts.anchors)
    np.testing.assert_array_equal(parts.anchor_of[parts.anchors], np.arange(len(parts.anchors)))
