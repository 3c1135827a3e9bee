"""The files of a simulated data set, laid out as the CryoBench benchmark lays out its own.

Called by `simulate.simulate`. Nothing here holds a date or a path, so that equal inputs give equal bytes.
"""

import os
import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import starfile
from mrcfile.mrcobject import MrcObject
from numpy.typing import NDArray
from scipy import ndimage

from spire_dist.physics.poses import relion_angles_from_matrices
from spire_dist.simulation.states import States

MASK_LEVEL, MASK_GROWTH = 0.02, 2
"""The mask: average map above this fraction of its maximum, grown by a ball of this many voxels."""
CREATOR = "spire_dist simulate"


def create_stack(path: Path, count: int, box: int, pixel_size: float) -> None:
    """A new stack [count, box, box], float32, to be opened with `mrcfile.mmap` and filled piece by piece."""
    with mrcfile.new_mmap(path, shape=(count, box, box), mrc_mode=2, overwrite=True) as stack:
        stack.set_image_stack()
        stack.voxel_size = pixel_size
        _label(stack)
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with open(path, "r+b") as file:  # a full disk then is an error here, not a crash when the map is written to
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def put_images(path: Path, rows: slice, images: NDArray) -> None:
    """Write `images` into these rows of a stack on disk."""
    with mrcfile.mmap(path, mode="r+") as stack:
        assert stack.data is not None
        stack.data[rows] = images


def write_map(path: Path, volume: NDArray[np.float32], pixel_size: float) -> None:
    """A map [z, y, x]; RELION, ChimeraX and the benchmark take its centre to be voxel box // 2."""
    with mrcfile.new(path, data=volume, overwrite=True) as file:
        file.voxel_size = pixel_size
        _label(file)


def _label(file: MrcObject) -> None:
    """Replace the first label, where mrcfile puts the date: equal seeds would not give equal files."""
    assert file.header is not None
    file.header.label[0] = CREATOR
    file.header.nlabl = 1


def average_mask(average: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mask, 0 or 1, of the average map over the states."""
    reach = np.arange(-MASK_GROWTH, MASK_GROWTH + 1)
    ball = reach[:, None, None] ** 2 + reach[:, None] ** 2 + reach**2 <= MASK_GROWTH**2
    return ndimage.binary_dilation(average > MASK_LEVEL * average.max(), structure=ball).astype(np.float32)


def write_tables(
    out: Path,
    counts: NDArray[np.int64],
    rotations: NDArray[np.float32],
    shifts: NDArray[np.float32],
    ctf: NDArray[np.float32],
    box: int,
    pixel_size: float,
    ctf_box: int,
) -> None:
    """particles.star and the three pickles, for particles in order of their states.

    counts [S], rotations [N, 3, 3], shifts [N, 2] Å (where the particle is), ctf [N, 9] of `schema.CTF_COLUMNS`. The pickle
    of the CTF is written for `ctf_box` px on the same width; cryoDRGN and `spire-dist prep` scale from there.
    """
    _write_star(out / "particles.star", counts, rotations, shifts, ctf, box, pixel_size)
    grid = np.array([ctf_box, box * pixel_size / ctf_box], dtype=np.float32)
    own_columns = np.broadcast_to(grid, (len(ctf), 2))
    pickles = {
        "gt_latents": np.repeat(np.arange(len(counts)), counts),
        # cryoDRGN's translation is the one that centres the particle, in fractions of the box.
        "combined_poses": (rotations, (-shifts / (box * pixel_size)).astype(np.float32)),
        "combined_ctfs": np.concatenate([own_columns, ctf[:, :7]], axis=1).astype(np.float32),
    }
    for name, value in pickles.items():
        (out / f"{name}.pkl").write_bytes(pickle.dumps(value))


def _write_star(path, counts, rotations, shifts, ctf, box, pixel_size) -> None:
    optics_rows, optics_group = np.unique(ctf[:, 3:6], axis=0, return_inverse=True)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroupName": [f"opticsGroup{i + 1}" for i in range(len(optics_rows))],
            "rlnOpticsGroup": np.arange(len(optics_rows)) + 1,
            "rlnVoltage": optics_rows[:, 0],
            "rlnSphericalAberration": optics_rows[:, 1],
            "rlnAmplitudeContrast": optics_rows[:, 2],
            "rlnImagePixelSize": pixel_size,
            "rlnImageSize": box,
            "rlnImageDimensionality": 2,
        }
    )
    angles = relion_angles_from_matrices(rotations)
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@images/{s:03d}.mrcs" for s, n in enumerate(counts) for i in range(n)],
            "rlnOpticsGroup": optics_group.reshape(-1) + 1,
            "rlnAngleRot": angles[:, 0],
            "rlnAngleTilt": angles[:, 1],
            "rlnAnglePsi": angles[:, 2],
            "rlnOriginXAngst": -shifts[:, 0],
            "rlnOriginYAngst": -shifts[:, 1],
            "rlnDefocusU": ctf[:, 0],
            "rlnDefocusV": ctf[:, 1],
            "rlnDefocusAngle": ctf[:, 2],
            "rlnPhaseShift": ctf[:, 6],
            "rlnCtfBfactor": ctf[:, 7],
            "rlnCtfScalefactor": ctf[:, 8],
        }
    )
    text = starfile.to_string({"optics": optics, "particles": particles}, float_format="%.6f")
    path.write_text(f"# {CREATOR}\n" + text.split("\n", 1)[1])  # instead of starfile's line with the date


def write_residues(path: Path, states: States) -> None:
    """One atom per residue: where it is in each state, whether it is there, which part it belongs to."""
    chosen = states.molecule.representative
    np.savez_compressed(
        path,
        coordinates=states.coordinates[:, chosen].astype(np.float32),
        present=states.present[:, chosen],
        group=states.group[chosen],
        group_names=np.array(states.group_names),
        chain=states.molecule.chains[chosen],
        residue=states.molecule.residues[chosen],
    )
