"""The truth of a simulated or benchmark set, laid out as CryoBench does. Used by evaluate.

vols/{box}_org/NNN.mrc   one map per conformation
init_mask/mask.mrc       real-space mask (optional)
gt_latents.pkl           conformation of each particle
residues.npz             residues and the group each moves with (optional)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from spire_dist import numpy_pickle
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.maps import read_map

PIXEL_TOLERANCE = 0.005
"""Relative; headers round pixel sizes, and released sets name 3.0 Å where the images are 3.002."""


@dataclass(frozen=True)
class Residues:
    """One representative atom per residue: coordinates [S, A, 3] Å from the middle of the box, present [S, A], group
    [A].

    Group 0 never moves; group k >= 1 is the k-th moving body, or the k-th block that some states lack.
    """

    coordinates: NDArray[np.float32]
    present: NDArray[np.bool_]
    group: NDArray[np.int64]
    names: list[str]


@dataclass(frozen=True)
class Truth:
    """A folder with known conformations, read for one box; maps come in that box by Fourier cropping if need be."""

    folder: Path
    maps: list[Path]
    own_box: int
    box: int
    pixel_size: float  # Å, in `box`

    def volume(self, state: int) -> NDArray[np.float32]:
        """The true map [box, box, box] of a conformation."""
        return fourier_crop(read_map(self.maps[state])[0], self.box)

    def average(self, weights: NDArray) -> NDArray[np.float32]:
        """The mean map, each conformation weighted by its number of images: the best that one rigid map could be."""
        total = np.zeros((self.box,) * 3, dtype=np.float64)
        for state, weight in enumerate(weights / np.sum(weights)):
            if weight > 0:
                total += weight * self.volume(state)
        return total.astype(np.float32)

    def mask(self) -> NDArray[np.float32] | None:
        """The mask as it is, or None; cropped to another box it is made binary again at a half."""
        path = self.folder / "init_mask" / "mask.mrc"
        if not path.exists():
            return None
        mask, _ = read_map(path)
        if len(mask) != self.own_box:
            raise SourceError(
                f"{path}: box {len(mask)} px, the true maps have {self.own_box}; give a mask of their box"
            )
        return mask if self.own_box == self.box else (fourier_crop(mask, self.box) > 0.5).astype(np.float32)

    def residues(self) -> Residues:
        """The residues and their groups."""
        path = self.folder / "residues.npz"
        if not path.exists():
            raise SourceError(f"{path}: no such file; without residues the parts cannot be compared")
        with np.load(path, allow_pickle=False) as file:
            missing = {"coordinates", "present", "group"} - set(file.files)
            if missing:
                raise SourceError(f"{path}: lacks {', '.join(sorted(missing))}; simulate the set again")
            group = file["group"].astype(np.int64)
            names = file["group_names"].tolist() if "group_names" in file.files else []
            residues = Residues(file["coordinates"], file["present"].astype(bool), group, names)
        if len(residues.coordinates) != len(self.maps):
            raise SourceError(
                f"{path}: {len(residues.coordinates)} states, but {len(self.maps)} true maps; they must agree"
            )
        return residues


def open_truth(folder: Path, box: int, pixel_size: float) -> Truth:
    """The truth in `folder`, to be compared with maps of `box` px at `pixel_size` Å."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; give the data set that holds vols/ and gt_latents.pkl")
    boxes = {int(p.name[:-4]): p for p in folder.glob("vols/*_org") if p.name[:-4].isdigit()}
    larger = [own for own in sorted(boxes) if own >= box]
    if not larger:
        found = f"boxes {sorted(boxes)}" if boxes else "nothing"
        raise SourceError(f"{folder}/vols: {found} there; the true maps of this run are looked for in vols/{box}_org")
    own_box = larger[0]
    maps = sorted(boxes[own_box].glob("[0-9]*.mrc"))
    if not maps:
        raise SourceError(f"{boxes[own_box]}: no maps NNN.mrc in it; give one for each conformation")
    volume, own_pixel = read_map(maps[0])
    if len(volume) != own_box:
        raise SourceError(f"{maps[0]}: box {len(volume)} px in a folder named for {own_box}")
    if abs(own_pixel * own_box / (pixel_size * box) - 1) > PIXEL_TOLERANCE:
        raise SourceError(
            f"{maps[0]}: {own_box} px × {own_pixel:.4g} Å, but the run has {box} px × {pixel_size:.4g} Å; "
            "the two boxes must be equally wide"
        )
    return Truth(folder, maps, own_box, box, own_pixel * own_box / box)


def read_labels(folder: Path, store: ParticleStore) -> NDArray[np.int64]:
    """The conformation of each particle [N], in store order: the store's own labels, or gt_latents.pkl by input row."""
    if store.label is not None:
        return np.asarray(store.label, dtype=np.int64)
    path, source_index = folder / "gt_latents.pkl", store.source_index
    if len(store.sources) > 1:
        held = f"{store.path} holds particles of {len(store.sources)}"
        raise SourceError(f"{path}: labels of which file? {held} and has no labels; merge stores that have them")
    if not path.exists():
        raise SourceError(f"{path}: no such file, and the store has no labels; give the conformation of each particle")
    labels = np.asarray(numpy_pickle.load(path)).squeeze()
    if labels.ndim != 1 or not np.array_equal(labels, np.rint(labels)):
        raise SourceError(f"{path}: array of shape {labels.shape}; one whole number per particle is needed")
    if len(labels) <= source_index.max():
        raise SourceError(
            f"{path}: {len(labels)} labels, but the store refers to row {source_index.max()} of its input"
        )
    return labels.astype(np.int64)[source_index]


def fourier_crop(volume: NDArray, box: int) -> NDArray[np.float32]:
    """A map of even side in a smaller even box of the same width in Å; values and middle stay."""
    own = len(volume)
    if own == box:
        return volume.astype(np.float32)
    spectrum = scipy.fft.fftshift(np.asarray(scipy.fft.fftn(scipy.fft.ifftshift(volume.astype(np.float64)))))
    keep = slice(own // 2 - box // 2, own // 2 + box // 2)
    cropped = scipy.fft.fftshift(np.asarray(scipy.fft.ifftn(scipy.fft.ifftshift(spectrum[keep, keep, keep]))))
    return (cropped.real * (box / own) ** 3).astype(np.float32)
