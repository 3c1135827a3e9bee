"""Poses between files and matrices. Numpy and scipy only, so that `data_prep` can use it without torch.

Inside the program a pose is a matrix R with `r_image = R @ r_volume` and a shift t in Å with a point c landing at
`(R c)[:2] + t`. RELION writes (rot, tilt, psi) in degrees, intrinsic ZYZ, and an origin of the opposite sign; cryoSPARC
writes a rotation vector, whose matrix is the transpose of RELION's for the same particle, and a shift in pixels of
`alignments3D/psize_A`.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation


def matrices_from_relion_angles(rot_deg: ArrayLike, tilt_deg: ArrayLike, psi_deg: ArrayLike) -> NDArray[np.float32]:
    """RELION's matrix of its three angles, degrees, as [N, 3, 3] (3dem/relion, Euler_angles2matrix).

    RELION rotates the axes, scipy the points; hence the transpose.
    """
    angles_n3 = np.stack([np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (rot_deg, tilt_deg, psi_deg)], axis=1)
    matrices_n33 = Rotation.from_euler("ZYZ", angles_n3, degrees=True).as_matrix()
    return np.swapaxes(matrices_n33, 1, 2).astype(np.float32)


def relion_angles_from_matrices(rotations_n33: ArrayLike) -> NDArray[np.float64]:
    """(rot, tilt, psi) in degrees, [N, 3], of matrices [N, 3, 3]; the inverse of `matrices_from_relion_angles`.

    At tilt 0 or 180, where only a sum of the other two is defined, the third angle is set to zero.
    """
    transposed = np.swapaxes(np.asarray(rotations_n33, dtype=np.float64), 1, 2)
    rotations = Rotation.from_matrix(transposed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gimbal lock")
        return rotations.as_euler("ZYZ", degrees=True)


def matrices_from_rotation_vectors(vectors_n3: ArrayLike) -> NDArray[np.float32]:
    """Matrices [N, 3, 3] of rotation vectors [N, 3] (axis times angle in radians; angles beyond π are allowed)."""
    return Rotation.from_rotvec(np.asarray(vectors_n3, dtype=np.float64)).as_matrix().astype(np.float32)


def random_rotations(count: int, seed: int) -> NDArray[np.float32]:
    """`count` matrices [count, 3, 3], uniform on SO(3)."""
    return Rotation.random(count, rng=np.random.default_rng(seed)).as_matrix().astype(np.float32)
