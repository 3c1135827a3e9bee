"""Pictures of Gaussian mixtures as shaded iso-surfaces coloured by part. Numpy only; used by the report.

The mixture is turned, rasterised on a grid as fine as the picture, and seen from +z (x to the right, y up, as ChimeraX
opens a map): every pixel looks along its ray for the first crossing of the contour level, takes the normal from the
density's gradient there, and mixes the parts' colours by their share of the density.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from spire_dist.physics.projector import render_volume
from spire_dist.results.pseudo_atoms import part_colour

ENCLOSED = 0.72
"""Share of a mixture's mass that the contour of `choose_scene` encloses."""
KEY_LIGHT = np.array([-0.45, 0.55, 0.70]) / np.linalg.norm([-0.45, 0.55, 0.70])
NEIGHBOURS = 10
"""Gaussians that colour a point of the surface."""
COARSE = 96
"""Voxels along the grid on which contour level and extent are found."""
CUT = 3.5
"""Standard deviations at which a Gaussian ends in a picture."""


@dataclass(frozen=True)
class Scene:
    """What stays the same in all pictures of a run, so that they can be compared.

    middle [3] Å, extent Å (side of the picture), level (contour density), view [3, 3] (rows: x, y, z of the picture).
    """

    middle: NDArray
    extent: float
    level: float
    view: NDArray
    pixels: int


def choose_scene(centres: NDArray, amplitudes: NDArray, widths: NDArray, pixels: int = 160) -> Scene:
    """A scene for mixtures centres [F, G, 3] Å, amplitudes [F, G], widths [G] Å, with motion in the picture's plane.

    The view looks along the direction of least motion (of least extent where nothing moves), the longest direction of
    what is left is upright; the contour encloses `ENCLOSED` of the first mixture's mass.
    """
    mass = np.clip(amplitudes, 0, None) * widths**3
    flat, weights = centres.reshape(-1, 3), mass.ravel() / max(mass.sum(), 1e-12)
    middle = weights @ flat
    shape = np.cov((flat - middle).T, aweights=weights + 1e-15)
    moved = centres - centres.mean(axis=0)
    motion = np.einsum("fg,fgi,fgj->ij", mass, moved, moved) / max(mass.sum(), 1e-12)
    looking = _positive(np.linalg.eigh(motion + 1e-3 * shape)[1][:, 0])
    in_plane = np.eye(3) - np.outer(looking, looking)
    upright = _positive(np.linalg.eigh(in_plane @ shape @ in_plane)[1][:, -1])
    view = np.stack([np.cross(upright, looking), upright, looking])
    coarse = Scene(middle, 2 * float(np.linalg.norm(flat - middle, axis=1).max() + 3 * widths.max()), 0.0, view, COARSE)
    densities = [_density(coarse, (c - middle) @ view.T, a, widths) for c, a in zip(centres, amplitudes, strict=True)]
    ordered = np.sort(np.clip(densities[0].ravel(), 0, None))[::-1]
    total = np.cumsum(ordered, dtype=np.float64)
    level = float(ordered[np.searchsorted(total, ENCLOSED * total[-1]).clip(max=len(ordered) - 1)])
    inside = np.argwhere(np.max(densities, axis=0) > level) - COARSE // 2
    centre = (inside.min(axis=0) + inside.max(axis=0)) / 2
    voxel = coarse.extent / COARSE
    radius = (np.linalg.norm(inside - centre, axis=1).max() + 2) * voxel
    return Scene(middle + voxel * centre[::-1] @ view, 2 * float(radius), level, view, pixels)


def _positive(direction: NDArray) -> NDArray:
    """An axis as the direction whose largest component is positive: the same picture on every machine."""
    return direction * np.sign(direction[np.abs(direction).argmax()])


def turned(scene: Scene, degrees: float, axis: int = 1) -> Scene:
    """The scene seen after turning the molecule about the picture's x (0), y (1) or z (2) axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array(
        [[[1, 0, 0], [0, c, -s], [0, s, c]], [[c, 0, s], [0, 1, 0], [-s, 0, c]], [[c, -s, 0], [s, c, 0], [0, 0, 1]]]
    )
    return Scene(scene.middle, scene.extent, scene.level, turn[axis] @ scene.view, scene.pixels)


def draw(scene: Scene, centres: NDArray, amplitudes: NDArray, widths: NDArray, parts: NDArray) -> NDArray[np.uint8]:
    """Picture [pixels, pixels, 4] of Gaussians centres [G, 3] Å, coloured by parts [G]: RGBA, transparent ground."""
    voxel, local = scene.extent / scene.pixels, (centres - scene.middle) @ scene.view.T
    density = _density(scene, local, amplitudes, widths)[::-1]  # the nearest section first
    peak = density.max(axis=0)
    crossing = (density > scene.level).argmax(axis=0)
    first = np.where(peak > scene.level, crossing, density.argmax(axis=0))
    rows, columns = np.indices(first.shape)
    here, before = density[first, rows, columns], density[np.maximum(first - 1, 0), rows, columns]
    back = np.clip((here - scene.level) / np.maximum(here - before, 1e-12), 0, 1)
    depth = first - np.where(peak > scene.level, back, 0)
    seen = peak > 0.5 * scene.level  # a little beyond the contour: the rim is blended with the ground
    points = np.stack([depth, rows, columns])[:, seen]

    slope = np.zeros((3, *first.shape))
    for axis in range(3):
        offset = np.eye(3)[axis][:, None]
        ahead, behind = (ndimage.map_coordinates(density, points + sign * offset, order=1) for sign in (1, -1))
        slope[axis][seen] = behind - ahead
    normal = slope[[2, 1, 0]] * np.array([1, 1, -1])[:, None, None]  # x, y, towards the viewer
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-12)

    middle = scene.pixels // 2
    places = (np.stack([points[2], points[1], scene.pixels - 1 - points[0]], axis=1) - middle) * voxel
    paint = np.zeros((3, *first.shape))
    paint[:, seen] = _colours(places, local, amplitudes, widths, parts).T
    diffuse, specular = _shade(normal, depth, seen)
    picture = np.clip(paint * diffuse + specular, 0, 1) ** (1 / 2.2)
    edge = (ndimage.maximum_filter(depth, 3) - ndimage.minimum_filter(depth, 3) > 2.5) & seen
    inner = edge & ndimage.binary_erosion(seen, iterations=2)  # one body before another: smooth the stair there
    picture = np.where(inner, ndimage.gaussian_filter(picture, (0, 0.8, 0.8)), picture)
    alpha = np.clip((peak / scene.level - 1) / 0.35 + 0.5, 0, 1)
    rgba = np.concatenate([picture, alpha[None]]).transpose(1, 2, 0)[::-1]  # y up
    return (255 * rgba + 0.5).astype(np.uint8)


def _density(scene: Scene, local: NDArray, amplitudes: NDArray, widths: NDArray) -> NDArray[np.float32]:
    """Density [pixels, pixels, pixels], indexed [z, y, x], of Gaussians at `local` [G, 3] Å in the scene's frame."""
    c, a, w = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32)) for v in (local, amplitudes, widths))
    return render_volume(c, a, w, scene.pixels, scene.extent / scene.pixels, CUT).numpy()


def _colours(places: NDArray, local: NDArray, amplitudes: NDArray, widths: NDArray, parts: NDArray) -> NDArray:
    """Linear colours [P, 3] at places [P, 3] Å: the parts', by the density of the `NEIGHBOURS` nearest Gaussians."""
    palette = np.array([to_rgb(part_colour(index)) for index in range(len(np.unique(parts)))]) ** 2.2
    own = palette[np.unique(parts, return_inverse=True)[1]]
    distance, nearest = KDTree(local).query(places, k=min(NEIGHBOURS, len(local)))
    distance, nearest = distance.reshape(len(places), -1), nearest.reshape(len(places), -1)
    share = np.abs(amplitudes[nearest]) * np.exp(-0.5 * (distance / widths[nearest]) ** 2) + 1e-12
    return np.einsum("pk,pkc->pc", share / share.sum(axis=1, keepdims=True), own[nearest])


def _shade(normal: NDArray, depth: NDArray, seen: NDArray) -> tuple[NDArray, NDArray]:
    """Diffuse and specular light [pixels, pixels] from normals [3, ...] and depths in pixels (larger is farther)."""
    diffuse = np.clip(np.tensordot(KEY_LIGHT, normal, axes=1), 0, 1)
    halfway = KEY_LIGHT + np.array([0, 0, 1])
    specular = np.clip(np.tensordot(halfway / np.linalg.norm(halfway), normal, axes=1), 0, 1) ** 28
    ground = np.where(seen, depth, np.inf)
    near, far = depth[seen].min(initial=np.inf), depth[seen].max(initial=-np.inf)
    filled = np.where(np.isfinite(ground), ground, far)
    hollow = np.zeros_like(filled)
    for reach in (2, 5, 11):  # a point lies in a hollow if its surroundings are nearer to the viewer
        hollow += np.clip((filled - ndimage.gaussian_filter(filled, reach)) / (2.5 * reach), 0, 1)
    occlusion = 1 - 0.55 * np.clip(hollow / 1.6, 0, 1)
    fog = 1 - 0.30 * np.clip((filled - near) / max(far - near, 1e-6), 0, 1)
    facing = np.clip(normal[2], 0, 1)
    ambient = 0.34 + 0.16 * facing
    return (ambient + 0.85 * diffuse) * occlusion * fog, 0.14 * specular * occlusion * fog
