"""Discrete states in latents, with classes that are known beforehand."""

import numpy as np
import pytest

from spire_dist.results import evaluate
from spire_dist.results.classes import MOST_STATES, mixture_index


def planted(states: int, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Latents [40 × states, 3] in clouds of standard deviation 1, `distance` apart on a line, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(states), 40))
    return rng.normal(size=(len(labels), 3)) + distance * labels[:, None] * [1, 0, 0], labels


def test_separate_clouds_are_told_apart_whatever_their_shape_and_numbering():
    z, labels = planted(5, 40.0)
    stretched = z @ np.array([[1.0, 0.4, 0], [0, 3.0, 0], [0, 0, 0.1]])
    assert mixture_index(stretched, 7 * labels + 3) == 1


def test_index_falls_as_clouds_merge_and_is_chance_where_latents_say_nothing():
    near, far = (mixture_index(*planted(3, distance)) for distance in (3.0, 4.0))
    assert near is not None
    assert far is not None
    assert 0.3 < near < far < 1
    z, labels = planted(4, 40.0)
    chance = mixture_index(z, np.random.default_rng(1).permutation(labels))
    assert chance == pytest.approx(0, abs=0.05)  # its standard deviation over permutations is 0.01


@pytest.mark.parametrize("states", [1, MOST_STATES + 1])
def test_one_state_and_a_continuous_motion_have_no_index(states: int):
    assert mixture_index(*planted(states, 9.0)) is None


def test_equal_latents_make_no_class():
    assert mixture_index(np.zeros((60, 4), np.float32), np.repeat([0, 1, 2], 20)) == 0


def test_evaluation_has_the_index_and_prints_it(standin):
    result, _ = evaluate.score_maps(standin, standin.directory.parent / "truth", conformations=2, images=0)
    assert result["classes"] == {"states": 6, "adjusted_rand_index": 1.0}  # clouds of 0.05 on a ring of radius 1
    assert "parts" not in result
    assert (
        "mixture of 6 Gaussians on the latents against the true states, adjusted Rand index: 1.000"
        in evaluate.table(result)
    )
