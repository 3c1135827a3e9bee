"""Do the latents tell discrete states apart? A mixture of Gaussians on them against the true labels."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

MOST_STATES = 20
"""With more of them the truth is taken for a continuous motion, whose steps nothing could tell apart."""
MOST_FITTED = 20_000
"""Latents a mixture is fitted to, evenly drawn; all are assigned by it."""
STARTS = 50
"""Of mixtures that begin elsewhere the likeliest counts; with few of them the index is that of a poor mixture."""


def mixture_index(latents: NDArray, labels: NDArray, seed: int = 0) -> float | None:
    """Adjusted Rand index (1: the same classes, 0: chance) of a mixture of Gaussians on latents [N, L] against labels [N].

    As many components as there are states among the labels, full covariances, the best of `STARTS` from k-means.
    None where there is one state, or more than `MOST_STATES`.
    """
    states = len(np.unique(labels))
    if not 2 <= states <= MOST_STATES:
        return None
    z = np.asarray(latents, dtype=np.float64)
    few = np.linspace(0, len(z) - 1, min(len(z), MOST_FITTED)).round().astype(int)
    mixture = GaussianMixture(states, covariance_type="full", init_params="kmeans", n_init=STARTS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # latents that are all the same have fewer classes than states
        classes = mixture.fit(z[few]).predict(z)
    return float(adjusted_rand_score(labels, classes))
