"""Paths through the latent space on clouds whose shape is known."""

import itertools

import numpy as np
import pytest

from spire_dist.errors import ConfigError, SourceError
from spire_dist.results import latent_paths


def ring(count=3000, noise=0.15, dimension=4):
    rng = np.random.default_rng(0)
    turn = rng.uniform(0, 2 * np.pi, count)
    points = np.zeros((count, dimension))
    points[:, 1], points[:, 3] = 2 * np.cos(turn), 2 * np.sin(turn)
    return (points + rng.normal(0, noise, points.shape)).astype(np.float32)


def test_loop_goes_once_around_a_ring():
    path = latent_paths.loop_path(ring(), 24)
    turn = np.unwrap(np.arctan2(path[:, 3], path[:, 1]))
    steps = np.diff(turn) * np.sign(turn[-1] - turn[0])
    assert (steps > 0).all()
    assert np.abs(turn[-1] - turn[0]) == pytest.approx(2 * np.pi * 23 / 24, rel=0.05)
    np.testing.assert_allclose(np.hypot(path[:, 1], path[:, 3]), 2, atol=0.35)


def test_loop_over_a_line_reaches_near_both_ends():
    rng = np.random.default_rng(0)
    line = np.stack([rng.uniform(-3, 3, 2000), rng.normal(0, 0.1, 2000)], axis=1).astype(np.float32)
    path = latent_paths.loop_path(line, 30)
    assert path[:, 0].min() < -2
    assert path[:, 0].max() > 2


def test_loop_of_one_latent_dimension_stays_in_the_data():
    data = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    path = latent_paths.loop_path(data, 10)
    assert path.shape == (10, 1)
    assert np.abs(path).max() < np.abs(data).max()


def test_same_seed_gives_the_same_loop():
    np.testing.assert_array_equal(latent_paths.loop_path(ring(), 12, 3), latent_paths.loop_path(ring(), 12, 3))


def test_axis_path_runs_between_percentiles_of_the_widest_direction():
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(5000, 3)) * [0.1, 4, 1] + [1, 2, 3]).astype(np.float32)
    path = latent_paths.axis_path(data, 1, 7)
    np.testing.assert_allclose(path[[0, -1], 1], np.percentile(data[:, 1], [5, 95]), atol=0.1)
    np.testing.assert_allclose(path[:, [0, 2]], np.broadcast_to([1, 3], (7, 2)), atol=0.2)


def test_points_are_evenly_spaced_along_the_corners():
    corners = np.float32([[0, 0], [2, 0], [2, 2]])
    np.testing.assert_allclose(latent_paths.through(corners, 5), [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]])
    closed = latent_paths.through(np.float32([[0, 0], [2, 0], [2, 2], [0, 2]]), 8, closed=True)
    np.testing.assert_allclose(closed[-1], [0, 1])


def test_tour_of_seven_points_is_the_shortest_of_all_orders():
    points = np.random.default_rng(7).normal(size=(7, 2))

    def length(order):
        return np.linalg.norm(np.diff(points[[*order, order[0]]], axis=0), axis=1).sum()

    best = min(length((0, *order)) for order in itertools.permutations(range(1, 7)))
    assert length(latent_paths.short_tour(points)) == pytest.approx(best, rel=0.05)


def test_cluster_centres_are_particles_and_follow_the_ring():
    data = ring()
    centres, rows = latent_paths.cluster_centres(data, 8)
    np.testing.assert_array_equal(centres, data[rows])
    turn = np.unwrap(np.arctan2(centres[:, 3], centres[:, 1]))
    assert (np.diff(turn) > 0).all() or (np.diff(turn) < 0).all()


def test_unknown_path_axis_and_file_are_refused_with_what_is_right(tmp_path):
    data = ring(100)
    with pytest.raises(ConfigError, match="'ring' is not known; give loop, axis-1"):
        latent_paths.named_path(data, "ring", 10)
    with pytest.raises(ConfigError, match="axis-1 to axis-4"):
        latent_paths.named_path(data, "axis-5", 10)
    np.save(tmp_path / "z.npy", np.zeros((3, 2)))
    with pytest.raises(SourceError, match="finite rows of 4 numbers"):
        latent_paths.named_path(data, str(tmp_path / "z.npy"), 10)
