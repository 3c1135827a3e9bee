"""How well discovered parts agree with the known moving groups. Used by evaluate, for either stage.

Every Gaussian gets a truth label: the group of the residue nearest to it, over the states, weighted by its amplitude in
each. Parts are then compared with truth by the adjusted Rand index (1 = equal, 0 = as good as chance) in three ways:

    unmerged         parts against groups as they are: splitting one body into several anchors is counted as an error
    merged           both reduced to moving / fixed; a part moves if most of its amplitude belongs to moving groups
    merged_by_model  the same, but a part moves by the model's own measure, which knows no truth (`variable_share`)

Only `merged` uses truth to name parts, so it asks whether the borders are right; `merged_by_model` asks also whether
the model would have told which side moves.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from sklearn.metrics import adjusted_rand_score

from spire_dist.results.truth import Residues

MOSTLY = 0.5
"""Share from which a part is said to move."""


class Agreement(TypedDict):
    """Adjusted Rand indices and what is known of each part; plain numbers, ready for JSON."""

    unmerged: float
    merged: float
    merged_by_model: float
    parts: list[dict]


def parts_agreement(
    centres: NDArray, amplitudes: NDArray, widths: NDArray, parts: NDArray, residues: Residues, states: NDArray
) -> Agreement:
    """Compare parts [G] with the groups of `residues`.

    centres [S, G, 3] Å, amplitudes [S, G], widths [G] Å: the model at S latents, which belong to conformations
    `states` [S].
    """
    weights = np.abs(amplitudes)
    labels = truth_labels(centres, weights, residues, states)
    share = variable_share(centres, weights, widths)
    motion = displacement(centres, weights)
    mean_weight = weights.mean(axis=0)
    by_truth, by_model = np.zeros(len(parts), dtype=bool), np.zeros(len(parts), dtype=bool)
    table = []
    for part in np.unique(parts):
        members = parts == part
        weight = mean_weight[members] if mean_weight[members].any() else np.ones(members.sum())
        moving = float(np.average(labels[members] > 0, weights=weight))
        variable = float(np.average(share[members], weights=weight))
        by_truth[members], by_model[members] = moving > MOSTLY, variable > MOSTLY
        table.append(
            {
                "part": int(part),
                "gaussians": int(members.sum()),
                "moving_in_truth": moving,
                "variable_share": variable,
                "displacement_a": float(np.sqrt(np.average(motion[members] ** 2, weights=weight))),
            }
        )
    return Agreement(
        unmerged=float(adjusted_rand_score(labels, parts)),
        merged=float(adjusted_rand_score(labels > 0, by_truth)),
        merged_by_model=float(adjusted_rand_score(labels > 0, by_model)),
        parts=table,
    )


def truth_labels(centres: NDArray, weights: NDArray, residues: Residues, states: NDArray) -> NDArray[np.int64]:
    """The group [G] of the residue nearest to each Gaussian, voted by the states with its amplitude there."""
    votes = np.zeros((centres.shape[1], int(residues.group.max()) + 1))
    for positions, weight, state in zip(centres, weights, states, strict=True):
        there = residues.present[state]
        nearest = KDTree(residues.coordinates[state, there]).query(positions)[1]
        np.add.at(votes, (np.arange(len(positions)), residues.group[there][nearest]), weight + 1e-12)
    return votes.argmax(axis=1)


def displacement(centres: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """Root-mean-square distance in Å [G] of each Gaussian from its mean place over S latents, weighted by amplitude."""
    share = weights / np.maximum(weights.sum(axis=0), 1e-12)  # [S, G]
    mean = np.einsum("sg,sgc->gc", share, centres)
    return np.sqrt(np.einsum("sg,sgc->g", share, (centres - mean) ** 2))


def variable_share(centres: NDArray, weights: NDArray, widths: NDArray) -> NDArray[np.float64]:
    """The share of a Gaussian's density that is not in its average over S latents: 0 = never changes, towards 1 = all
    of it.

    With density g_s at latent s, `1 - ‖mean of g_s‖² / mean of ‖g_s‖²`; two isotropic Gaussians of width w at a
    distance d have `<g_s, g_t> ∝ a_s a_t exp(-d² / (4 w²))`. Motion and coming and going count alike, in units of
    what the map can resolve.
    """
    overlap = np.zeros(centres.shape[1])
    for positions, weight in zip(centres, weights, strict=True):
        squared = ((centres - positions) ** 2).sum(axis=2)  # [S, G]
        overlap += (weights * weight * np.exp(-squared / (4 * widths**2))).sum(axis=0)
    power = len(centres) * (weights**2).sum(axis=0)
    return 1 - np.divide(overlap, power, out=np.ones(len(overlap)), where=power > 0)
