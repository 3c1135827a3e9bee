"""The particle table that `relion.py` and `cryosparc.py` fill, and the checks both share. Reads no file."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spire_dist.errors import SourceError

PIXEL_SIZES_A = (0.05, 100.0)
"""Å/px beyond which a pixel size is taken for a mistake in units."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParticleTable:
    """What a STAR or .cs file says of its N particles, in its row order."""

    source: Path
    image_paths: list[str]
    """Distinct stacks, as written in the file (cryoSPARC's leading ">" removed)."""
    image_file: NDArray[np.int32]
    """[N], index into `image_paths`."""
    slice_index: NDArray[np.int64]
    """[N], slice of the stack, from 0."""
    rotations: NDArray[np.float32] | None
    """[N, 3, 3], r_image = R @ r_volume; None where the file has no poses."""
    shifts_a: NDArray[np.float32] | None
    """[N, 2], Å, (x, y); a point c lands at (R c)[:2] + t; None with `rotations`."""
    ctf: NDArray[np.float32]
    """[N, 9], columns `schema.CTF_COLUMNS`."""
    optics_group: NDArray[np.int32]
    """[N], index into `optics_names`."""
    optics_names: list[str]
    pixel_size_a: NDArray[np.float64]
    """[N], Å/px of the images on disk."""
    stated_box: NDArray[np.int64] | None
    """[N], px, where the file states it."""
    sign_hint: float | None
    """cryoSPARC's blob/sign: -1 where the protein is dark; None where the file says nothing."""
    ignored: list[str]
    """Effects that the file describes and the image model leaves out, such as beam tilt."""
    source_index: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[N], row in `source`, from 0; the tilts of one particle share it. Default: one image for each row, in order."""
    source_rows: int = 0
    """Rows of `source`. Default: as many as images."""
    uid: NDArray[np.uint64] | None = None
    """[N], cryoSPARC's number of each particle, the same in all of its files."""
    tilt: NDArray[np.int32] | None = None
    """[N, 2], where each image is one of a tilt series: its number there, from 0, and how many the series has."""
    ctf_premultiplied: bool = False
    """The images were already multiplied by their CTF, so that they show CTF² · projection."""
    also_read: list[Path] = field(default_factory=list)
    """Files beside `source` that the table was made from."""
    missing_poses: str = ""
    """Why `rotations` is None, where the file tells."""

    def __post_init__(self) -> None:
        if len(self.source_index) == 0:
            object.__setattr__(self, "source_index", np.arange(len(self)))
        if not self.source_rows:
            object.__setattr__(self, "source_rows", len(self))

    def __len__(self) -> int:
        return len(self.slice_index)


def finite(source: Path, name: str, values: ArrayLike) -> NDArray[np.float64]:
    """`values` [N, ...] as float64; a NaN or infinity is refused, naming its row, counted from 1."""
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
    if bad.size:
        more = f" and {bad.size - 1} more" if bad.size > 1 else ""
        raise SourceError(f"{source}: {name} is not a finite number in row {bad[0] + 1}{more}; correct or remove it")
    return array


def sane_pixel_sizes(source: Path, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` [N] Å/px, refused where they cannot be in Å."""
    low, high = PIXEL_SIZES_A
    bad = np.flatnonzero(~((values >= low) & (values <= high)))  # NaN too
    if bad.size:
        raise SourceError(
            f"{source}: pixel size {values[bad[0]]:g} Å in row {bad[0] + 1}; expected {low:g} to {high:g} Å"
        )
    return values
