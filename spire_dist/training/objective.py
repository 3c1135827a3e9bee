"""What a step minimises: the misfit of a rank's own images, rendered by the Gaussians of its whole group."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from spire_dist.config import RunConfig, StageConfig
from spire_dist.data.loader import Batch
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.image_model import squared_residuals
from spire_dist.model.latents import ImageEncoder
from spire_dist.model.mixtures import Mixture
from spire_dist.model.pose_corrections import corrected, correction_prior
from spire_dist.model.sharing import render_each, render_shared


class Objective(nn.Module):
    """The model of one stage as seen by its loss: the mixture (of a rank: its share) and, where there is one, the encoder."""

    def __init__(
        self, mixture: Mixture, encoder: ImageEncoder | None, config: RunConfig, stage: int, count: int, mesh: Mesh
    ) -> None:
        """`count` particles are in the store."""
        super().__init__()
        self.mixture, self.encoder = mixture, encoder
        self.config, self.count, self.mesh = config, count, mesh
        self.stage: StageConfig = config.stage1 if stage == 1 else config.stage2

    def forward(
        self,
        batch: Batch,
        latents: Tensor | None,
        warm: bool,
        corrections: Tensor | None = None,
        tried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(objective, squared residuals [B]) of a rank's batch, whose `latents` [B, L] a table has or no one; and those of the
        same images at each of the latents `tried` [K, L], [K, B].

        The mean of the objective over ranks is, in nats per image of the step: ½ |I - CTF · P|² + λ_z |z|² + λ_f Σ|df|² / N
        (equation 7; images have unit noise), and where poses are corrected (`corrections` [B, 5]) the prior of that; an
        encoder sees them as they were given. Each rank has the regulariser of its own Gaussians, hence G times: R groups
        have the same ones, and the mean is over R G. During warm-up every latent is zero, so that the static Gaussians settle
        first.
        """
        mesh, real = self.mesh, len(batch.rows)
        z = latents if self.encoder is None else self._encoded(batch)
        assert z is not None
        prior = self.config.latent.weight * z.square().sum(1)
        if corrections is not None:
            rotations, shifts_px = corrected(batch.rotations, batch.shifts_px, corrections, self.config.poses)
            batch = replace(batch, rotations=rotations, shifts_px=shifts_px)
            prior = prior + correction_prior(corrections, self.config.poses)
        if mesh.world > 1:
            batch = filled(batch, self.stage.batch // mesh.world)
        seen = torch.cat([torch.zeros_like(z) if warm else z, z.new_zeros(len(batch.images) - real, z.shape[1])])
        box = batch.images.shape[-2]
        projections = render_shared(
            mesh, self.mixture, seen, batch.rotations, batch.shifts_px, box, self.stage.cut, self.config.projector
        )
        squared = squared_residuals(projections, batch.ctf, batch.images)[:real]
        own = (0.5 * squared + prior).sum() * mesh.world / batch.total
        found = own + self.mixture.regulariser() * (mesh.gauss / self.count)
        return found, squared.detach(), self._tried(batch, tried)[:, :real]

    @torch.no_grad()
    def _tried(self, batch: Batch, tried: Tensor | None) -> Tensor:
        """Squared residuals [K, B] of the batch's images, were they all of the molecule at each of K latents."""
        if tried is None or len(tried) == 0:
            return batch.shifts_px.new_zeros(0, len(batch.images))
        box, poses = batch.images.shape[-2], (batch.rotations, batch.shifts_px)
        seen = render_each(self.mesh, self.mixture, tried, *poses, box, self.stage.cut, self.config.projector)
        return torch.stack([squared_residuals(projections, batch.ctf, batch.images) for projections in seen])

    def _encoded(self, batch: Batch) -> Tensor:
        assert self.encoder is not None
        seen = (batch.images, batch.ctf, batch.rotations, batch.shifts_px)
        return self.encoder(*(values[: len(batch.rows)] for values in seen))

    def nothing(self, device: torch.device) -> tuple[Batch, Tensor, bool]:
        """What to call it with for an objective of no particle."""
        images, box = self.stage.batch // self.mesh.world, 16
        zeros = torch.zeros(images, box, box // 2 + 1, device=device)
        poses = zeros.new_zeros(images, 3, 3), zeros.new_zeros(images, 2)
        batch = Batch(torch.empty(0, dtype=torch.long, device=device), zeros + 0j, zeros, *poses, total=1)
        return batch, zeros.new_zeros(0, self.config.latent.dimension), False


def filled(batch: Batch, images: int) -> Batch:
    """A batch of fewer particles with nothing in the places it lacks, so that all ranks' are of one size."""
    lacking = images - len(batch.images)
    if lacking == 0:
        return batch
    names = ("images", "ctf", "rotations", "shifts_px")
    zeros = {name: getattr(batch, name).new_zeros(lacking, *getattr(batch, name).shape[1:]) for name in names}
    return replace(batch, **{name: torch.cat([getattr(batch, name), zeros[name]]) for name in names})
