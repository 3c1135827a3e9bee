"""The two models: what a latent does to the Gaussians.

Coarse (stage 1, paper section 3):      c_i(z) = c_i + shift([z, f_i]),  m_i(z) = m_i σ(occupancy([z, f_i]))
Hierarchical (stage 2, equations 3-6):  c_i = ca_a + dc_i, f_i = fa_a + df_i;  (R_a, t_a) = motion([z, fa_a])
                                        c_i(z) = R_a dc_i + ca_a + t_a + shift([z, f_i]),  m_i(z) = m_i σ(occupancy([z, f_i]))

with a = a_i the anchor of Gaussian i for good. Rotations turn about the anchor's centre; the residual shift is taken in
the particle's frame (both open in the paper). Widths never depend on the latent.
"""

import copy

import torch
from torch import Tensor, nn

from spire_dist.config import HierarchyConfig, StageConfig
from spire_dist.model.deformation import PairNetwork, rotations_from_6d
from spire_dist.model.gaussians import Gaussians, keep

OPEN_BIAS = 2.0
"""Start of the occupancy's logit: σ(2) = 0.88, open but not saturated."""
ANCHOR_MOTION_PX = 5.0
"""Pixels of anchor translation per unit of the motion network's output."""


class CoarseMixture(nn.Module):
    """Stage 1, and stage 2 without its hierarchy: every Gaussian moves by itself.

    There `anchor_of` [N] says which part each Gaussian comes from; it moves nothing.
    """

    anchor_of: Tensor | None

    def __init__(self, gaussians: Gaussians, latent: int, config: StageConfig, anchor_of: Tensor | None = None) -> None:
        super().__init__()
        features = gaussians.features.shape[1]
        self.gaussians = gaussians
        self.register_buffer("anchor_of", anchor_of)
        self.shift = PairNetwork(latent, features, config.hidden, config.layers, 3, gain=config.motion_px)
        self.occupancy = PairNetwork(latent, features, config.hidden, config.layers, 1, bias=OPEN_BIAS)

    def deform(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, L] -> centres [B, N, 3] px from the centre of the box, peak densities [B, N]."""
        own = self.gaussians
        centres = own.offsets + self.shift(latents, own.features)
        amplitudes = own.peak_densities() * torch.sigmoid(self.occupancy(latents, own.features).squeeze(-1))
        return centres, amplitudes

    def regulariser(self) -> Tensor:
        """Nothing beside the latents is penalised."""
        return self.gaussians.unit.new_zeros(())

    def with_gaussians(self, gaussians: Gaussians, rows: Tensor) -> "CoarseMixture":
        """The same networks (not copies) with other Gaussians, `rows` [n] of the present ones."""
        part = copy.copy(self)
        part._modules = self._modules | {"gaussians": gaussians}
        part._buffers = self._buffers | {"anchor_of": None if self.anchor_of is None else self.anchor_of[rows]}
        return part


class HierarchicalMixture(nn.Module):
    """Stage 2: Gaussians ride on anchors that move rigidly, with a small shift of their own.

    Gaussians come sorted by anchor (`anchor_of` [N] ascending), so that an anchor's Gaussians are one slice: no gather, whose
    backward pass would add in an order that changes from run to run.
    """

    anchor_of: Tensor
    anchor_features: Tensor

    def __init__(
        self,
        gaussians: Gaussians,
        anchor_of: Tensor,
        anchor_centres_px: Tensor,
        anchor_features: Tensor,
        latent: int,
        config: HierarchyConfig,
    ) -> None:
        super().__init__()
        features = gaussians.features.shape[1]
        assert (anchor_of.diff() >= 0).all(), "Gaussians must be sorted by anchor"
        self.gaussians = gaussians
        self.register_buffer("anchor_of", anchor_of.clone())
        self.sizes = torch.bincount(anchor_of, minlength=len(anchor_centres_px)).tolist()
        self.anchor_centres = nn.Parameter(anchor_centres_px.clone())
        keep(self, "anchor_features", anchor_features, fixed=not isinstance(gaussians.features, nn.Parameter))
        self.motion = PairNetwork(latent, features, config.anchor_hidden, config.anchor_layers, 9)
        self.shift = PairNetwork(latent, features, config.hidden, config.layers, 3, gain=config.motion_px)
        self.occupancy = PairNetwork(latent, features, config.hidden, config.layers, 1, bias=OPEN_BIAS)
        self.feature_weight = config.feature_weight

    def anchor_motion(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, L] -> rotation [B, A, 3, 3] and moved centre [B, A, 3] px of every anchor (equation 4)."""
        numbers = self.motion(latents, self.anchor_features)
        return rotations_from_6d(numbers[..., :6]), self.anchor_centres + ANCHOR_MOTION_PX * numbers[..., 6:]

    def features(self) -> Tensor:
        """Features [N, E] of the Gaussians: their anchor's and their own share (equation 3)."""
        shared = [row.expand(size, -1) for row, size in zip(self.anchor_features, self.sizes, strict=True)]
        return torch.cat(shared) + self.gaussians.features

    def rigid_centres(self, latents: Tensor) -> Tensor:
        """Latents [B, L] -> centres [B, N, 3] px of Gaussians held rigidly to their anchors: R_a dc_i + ca_a + t_a."""
        rotations, anchors = self.anchor_motion(latents)
        motions = torch.cat([rotations.transpose(2, 3), anchors[:, :, None]], dim=2).flatten(1, 2)  # [B, 4 A, 3]
        arms = torch.cat([self.gaussians.offsets, self.gaussians.offsets.new_ones(len(self.anchor_of), 1)], dim=1)
        # One product of a matrix [N, 4 A], zero but for each Gaussian's own anchor, instead of one per anchor.
        return torch.block_diag(*arms.split(self.sizes)) @ motions

    def deform(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, L] -> centres [B, N, 3] px from the centre of the box, peak densities [B, N]."""
        own, features = self.gaussians, self.features()
        centres = self.rigid_centres(latents) + self.shift(latents, features)
        amplitudes = own.peak_densities() * torch.sigmoid(self.occupancy(latents, features).squeeze(-1))
        return centres, amplitudes

    def regulariser(self) -> Tensor:
        """λ_f Σ|df|² (equation 7), of features that learn."""
        if not isinstance(self.gaussians.features, nn.Parameter):
            return self.gaussians.unit.new_zeros(())
        return self.feature_weight * self.gaussians.features.square().sum()

    def with_gaussians(self, gaussians: Gaussians, rows: Tensor) -> "HierarchicalMixture":
        """The same networks and anchors (not copies) with other Gaussians, `rows` [n], ascending, of the present ones."""
        part = copy.copy(self)
        anchor_of = self.anchor_of[rows]
        part._modules = self._modules | {"gaussians": gaussians}
        part._buffers = self._buffers | {"anchor_of": anchor_of}
        part.sizes = torch.bincount(anchor_of, minlength=len(self.anchor_centres)).tolist()
        return part


Mixture = CoarseMixture | HierarchicalMixture
