"""The Gaussians' own parameters, and how they are drawn from a map.

Each has an offset (from its anchor, or from the centre of the box where there are no anchors), a width, an amplitude and
a feature vector. Learned quantities are kept in units in which a step of Adam means the same for all: centres in pixels,
widths as logarithms, amplitudes as shares of the seed amplitude. Features are learned too, or fixed, for comparison, at an
encoding of the place where a Gaussian starts.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MIN_WIDTH_PX = 0.5
"""Narrower Gaussians fall between the pixels of the point-sampled projection."""
FEATURE_SPREAD = 0.3
"""Standard deviation of the features at the start."""


class Gaussians(nn.Module):
    """N Gaussians: `offsets` [N, 3] px, `log_widths` [N] (of width / px), `amplitudes` [N] (of `unit`), `features` [N, E]."""

    unit: Tensor
    features: Tensor

    def __init__(
        self, offsets_px: Tensor, widths_px: Tensor, features: Tensor, unit: float = 1.0, fixed_features: bool = False
    ) -> None:
        super().__init__()
        self.offsets = nn.Parameter(offsets_px.clone())
        self.log_widths = nn.Parameter(torch.log(widths_px))
        self.amplitudes = nn.Parameter(torch.ones(len(offsets_px)))
        keep(self, "features", features, fixed_features)
        self.register_buffer("unit", torch.tensor(unit))

    def widths_px(self) -> Tensor:
        """Standard deviations [N] in pixels."""
        return self.log_widths.exp().clamp(min=MIN_WIDTH_PX)

    def peak_densities(self) -> Tensor:
        """Amplitudes [N] as densities."""
        return self.amplitudes * self.unit


def keep(module: nn.Module, name: str, values: Tensor, fixed: bool) -> None:
    """Have a module hold a copy of `values` under a name: as a parameter that learns, or fixed."""
    if fixed:
        module.register_buffer(name, values.clone())
    else:
        module.register_parameter(name, nn.Parameter(values.clone()))


def draw_centres(
    volume: NDArray[np.float32], count: int, rng: np.random.Generator, threshold: float = 0.05
) -> NDArray[np.float32]:
    """`count` points [count, 3] in pixels, (x, y, z) from the centre, drawn from a map's density above a share of its peak.

    Voxels are drawn in proportion to their density (systematic resampling, which spreads the points evenly) and each
    point is placed at random inside its voxel.
    """
    density = np.where(volume > threshold * volume.max(), volume, 0).astype(np.float64).ravel()
    edges = np.cumsum(density)
    voxels = np.searchsorted(edges, (np.arange(count) + rng.random(count)) * edges[-1] / count)
    z, y, x = np.unravel_index(np.minimum(voxels, density.size - 1), volume.shape)
    points = np.stack([x, y, z], axis=1) - volume.shape[0] // 2 + rng.uniform(-0.5, 0.5, (count, 3))
    return points.astype(np.float32)


def random_features(count: int, dimension: int, rng: np.random.Generator) -> Tensor:
    """Features [count, dimension] to start from: random, but small beside what they learn, or clusters would show the start."""
    return FEATURE_SPREAD * torch.from_numpy(rng.standard_normal((count, dimension)).astype(np.float32))


def position_features(points_px: Tensor, box: int, dimension: int) -> Tensor:
    """Features [N, dimension] that say where points [N, 3] lie, in pixels from the centre of a box of `box` pixels.

    sin and cos of 2^k π p for p in [-1, 1] across the box and k = 0, 1, ..., as many octaves as there is room for; zeros fill
    up the rest (Mildenhall et al., ECCV 2020, equation 4).
    """
    octaves = 2.0 ** torch.arange(dimension // 6) * torch.pi
    angles = (points_px * (2 / box))[:, :, None] * octaves
    encoded = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return nn.functional.pad(encoded, (0, dimension - encoded.shape[1]))
