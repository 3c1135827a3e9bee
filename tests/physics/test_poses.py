"""Angles and rotation vectors to matrices, against roma, RELION's written-out formula and cryoDRGN's parsed poses."""

import pickle

import numpy as np
import pytest
import roma
import starfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from spire_dist.physics.poses import (
    matrices_from_relion_angles,
    matrices_from_rotation_vectors,
    random_rotations,
    relion_angles_from_matrices,
)

degrees = st.floats(-180, 180, allow_nan=False, width=32)


def test_relion_angles_give_romas_transposed_zyz_matrices():
    angles = np.random.default_rng(0).uniform(-180, 180, (50, 3))
    expected = roma.euler_to_rotmat("ZYZ", torch.from_numpy(angles), degrees=True).transpose(1, 2)
    np.testing.assert_allclose(matrices_from_relion_angles(*angles.T), expected, atol=1e-6)


@given(rot=degrees, tilt=degrees, psi=degrees)
def test_relion_angles_give_the_matrix_that_relion_writes_out(rot, tilt, psi):
    (ca, cb, cg), (sa, sb, sg) = np.cos(np.deg2rad([rot, tilt, psi])), np.sin(np.deg2rad([rot, tilt, psi]))
    expected = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    np.testing.assert_allclose(matrices_from_relion_angles(rot, tilt, psi)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("rot", "tilt", "psi"), [(30, 0, 20), (30, 180, 20), (0, 0, 0), (-170, 90, 179)])
def test_angles_survive_the_way_to_matrices_and_back_also_where_they_are_not_unique(rot, tilt, psi):
    matrices = matrices_from_relion_angles(rot, tilt, psi)
    again = matrices_from_relion_angles(*relion_angles_from_matrices(matrices).T)
    np.testing.assert_allclose(again, matrices, atol=2e-6)


@given(rot=degrees, tilt=degrees, psi=degrees)
def test_any_angles_survive_the_way_to_matrices_and_back(rot, tilt, psi):
    matrices = matrices_from_relion_angles(rot, tilt, psi)
    again = matrices_from_relion_angles(*relion_angles_from_matrices(matrices).T)
    np.testing.assert_allclose(again, matrices, atol=1e-3)  # float32 matrices near tilt 0 fix the tilt to 0.02 degrees


def test_rotation_vectors_longer_than_pi_give_romas_matrices():
    vectors = np.random.default_rng(1).normal(size=(50, 3)) * 3
    assert (np.linalg.norm(vectors, axis=1) > np.pi).sum() > 10
    expected = roma.rotvec_to_rotmat(torch.from_numpy(vectors))
    np.testing.assert_allclose(matrices_from_rotation_vectors(vectors), expected, atol=1e-6)


def test_poses_of_a_relion_file_are_those_that_cryodrgn_parsed(shared_data):
    table = starfile.read(
        shared_data / "metadata/ml-struct-bio+cryodrgn/tests/data/FinalRefinement-OriginalParticles-PfCRT.star"
    )
    with open(shared_data / "particles/ml-struct-bio+cryodrgn/tests/data/pose.star.pkl", "rb") as file:
        expected, _ = pickle.load(file)
    found = matrices_from_relion_angles(table["rlnAngleRot"], table["rlnAngleTilt"], table["rlnAnglePsi"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_random_rotations_are_uniform_proper_and_decided_by_the_seed():
    rotations = random_rotations(4000, seed=5).astype(np.float64)
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (4000, 3, 3)), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-6)
    # On SO(3) every entry has mean 0 and variance 1/3; with 4000 draws 0.04 is five standard errors.
    np.testing.assert_allclose(rotations.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose((rotations**2).mean(axis=0), 1 / 3, atol=0.04)
    np.testing.assert_array_equal(random_rotations(4, seed=5), random_rotations(4, seed=5))
    assert not np.array_equal(random_rotations(4, seed=5), random_rotations(4, seed=6))
