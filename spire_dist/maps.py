"""Maps in and out: `.mrc` files with a pixel size and an origin that make them overlay in ChimeraX."""

from pathlib import Path

import mrcfile
import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import SourceError
from spire_dist.files import replacing


def read_map(path: Path) -> tuple[NDArray[np.float32], float]:
    """A cubic map [D, D, D] indexed [z, y, x] and its pixel size in Å. Raises SourceError for anything else."""
    try:
        with mrcfile.open(path, permissive=False) as mrc:
            volume = np.array(mrc.data, dtype=np.float32)
            pixel_size = float(mrc.voxel_size.x)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path}: cannot be read as an MRC map ({str(error).splitlines()[0]}); give a .mrc file"
        ) from error
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise SourceError(f"{path}: shape {volume.shape} is not a cube; give a map with three equal sides")
    if not pixel_size > 0:
        raise SourceError(f"{path}: pixel size {pixel_size} in the header; set it (Å per voxel) and try again")
    return volume, pixel_size


def write_map(path: Path, volume: NDArray[np.float32], pixel_size: float) -> None:
    """Write [z, y, x] with `pixel_size` Å; complete or absent. Creates the folder.

    The origin stays 0, as RELION and cryoSPARC write it, so that maps of this program lie on the maps and on the models
    fitted to maps of those; the particle's centre is voxel D // 2.
    """
    with replacing(path) as partial, mrcfile.new(partial, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(volume, dtype=np.float32))
        mrc.voxel_size = pixel_size
