"""placeholder"""

import numpy as np
import starfile
from pathlib import Path
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from spire_dist.physics.poses import matrices_from_relion_angles, relion_angles_from_matrices


def perturb(source: Path, out: Path, turn_deg: float, shift_a: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = starfile.read(source, always_dict=True)
    rows = blocks["particles"]
    angles = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    true = matrices_from_relion_angles(*(rows[a] for a in angles))
    turns = Rotation.from_rotvec(rng.normal(0, turn_deg / 3**0.5, (len(rows), 3)), degrees=True)
    rows[angles] = relion_angles_from_matrices((turns * Rotation.from_matrix(true)).as_matrix())
    rows[["rlnOriginXAngst", "rlnOriginYAngst"]] += rng.normal(0, shift_a / 2**0.5, (len(rows), 2))
    starfile.write(blocks, out, overwrite=True)


def pose_errors(found, true):
    (rf, tf), (rt, tt) = found, true
    rf = rf.astype(float)
    rt = rt.astype(float)
    q = Rotation.from_matrix(np.swapaxes(rf, 1, 2) @ rt).mean()
    angle = np.degrees((Rotation.from_matrix(rf) * q * Rotation.from_matrix(rt).inv()).magnitude())
    planar = rf[:, :2].reshape(-1, 3)
    d = np.linalg.lstsq(planar, (tt - tf).reshape(-1))[0]
    shift = np.linalg.norm((tt - tf) - (planar @ d).reshape(-1, 2), axis=1)
    return angle, shift, np.degrees(q.magnitude()), np.linalg.norm(d)
