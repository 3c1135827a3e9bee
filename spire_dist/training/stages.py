"""How each stage begins: from a map to the coarse model, from the coarse model to parts and the hierarchy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.config import HierarchyConfig, RunConfig
from spire_dist.data.loader import Batch
from spire_dist.errors import RunError
from spire_dist.model.gaussians import Gaussians, draw_centres, position_features, random_features
from spire_dist.model.image_model import render
from spire_dist.model.mixtures import CoarseMixture, HierarchicalMixture, Mixture
from spire_dist.model.part_count import PartStudy, choose_count, measure_counts, part_stability
from spire_dist.model.parts import Parts, discover_parts, mass_weights

SEED_SPREAD = 0.75
"""Width of a seed Gaussian as a share of the mean distance between Gaussians."""
JITTER = 0.5
"""Displacement of a stage-2 Gaussian from its stage-1 parent, as a share of the parent's width."""
SAMPLES = 256
"""Latents over which stage 1 is summarised."""
DISTIL_BATCH = 64
DISTIL_RATE = 5e-3


def seed_coarse(volume: NDArray[np.float32], config: RunConfig, sample: Batch) -> CoarseMixture:
    """The coarse model before training: Gaussians drawn from a map [D, D, D], one amplitude fitted to `sample` images."""
    rng = np.random.default_rng(config.seed)
    count = config.stage1.gaussians
    centres = torch.from_numpy(draw_centres(volume, count, rng))
    occupied = float((volume > 0.05 * volume.max()).sum())
    widths = torch.full((count,), max(0.7, SEED_SPREAD * (occupied / count) ** (1 / 3)))
    fixed = config.feature_kind == "position"
    own = (
        position_features(centres, len(volume), config.features)
        if fixed
        else random_features(count, config.features, rng)
    )
    gaussians = Gaussians(centres, widths, own, fixed_features=fixed)
    mixture = CoarseMixture(gaussians, config.latent.dimension, config.stage1)
    gaussians.unit.fill_(fit_scale(mixture, config, sample))
    return mixture


def fit_scale(mixture: CoarseMixture, config: RunConfig, sample: Batch) -> float:
    """The factor that brings the model's images closest to `sample` (least squares over all of them)."""
    latents = torch.zeros(len(sample.rows), config.latent.dimension)
    box = sample.images.shape[-2]
    with torch.no_grad():
        images = render(mixture, latents, sample.rotations, sample.shifts_px, box, config.stage1.cut)
    predicted = sample.ctf * torch.fft.rfft2(images)
    predicted[:, 0, 0] = 0  # the mean of an image says nothing: the background was subtracted
    scale = ((predicted.conj() * sample.images).real.sum() / predicted.abs().square().sum()).item()
    return max(scale, 1e-6)


@torch.no_grad()
def summarise(mixture: CoarseMixture, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [S, N, 3] px and masses [S, N] of the coarse Gaussians at latents [S, L]."""
    centres, amplitudes = mixture.deform(latents)
    return centres, amplitudes.clamp(min=0) * mixture.gaussians.widths_px() ** 3


def sample_latents(latents: Tensor, seed: int) -> Tensor:
    """`SAMPLES` of the particles' latents; the first is the one with most others around it, the reference."""
    rng = np.random.default_rng(seed)
    chosen = latents[torch.from_numpy(rng.permutation(len(latents))[:SAMPLES])]
    distances = torch.cdist(chosen, chosen)
    width = distances.median() / 4 + 1e-6
    crowd = torch.exp(-0.5 * (distances / width) ** 2).sum(1)
    best = int(crowd.argmax())
    return torch.cat([chosen[best : best + 1], chosen[:best], chosen[best + 1 :]])


def find_parts(mixture: CoarseMixture, latents: Tensor, config: RunConfig) -> tuple[Parts, PartStudy]:
    """Parts of a trained coarse model whose particles lie at `latents` [N, L], and how firmly they are found."""
    centres, masses = summarise(mixture, sample_latents(latents, config.seed))
    if not (torch.isfinite(masses).all() and torch.isfinite(centres).all() and masses.sum() > 0):
        raise RunError(
            "stage 1 ended without usable Gaussians (vanished or not finite); start a new --run with lower stage1.rates"
        )
    features, mass, wanted = feature_view(mixture), masses.mean(0).numpy(), config.parts.clusters
    weights = mass_weights(mass)
    counts = range(1, config.parts.most + 1) if wanted == "auto" else [wanted]
    measures = measure_counts(features, weights, counts, config.seed)
    chosen = choose_count(measures) if wanted == "auto" else wanted
    parts = discover_parts(features, centres[0].numpy(), mass, chosen, config.parts.anchors, config.seed)
    stability = part_stability(features, weights, parts.cluster, config.seed)
    return parts, PartStudy("data" if wanted == "auto" else "hand", len(stability), measures, stability)


@torch.no_grad()
def feature_view(mixture: CoarseMixture) -> NDArray[np.float32]:
    """Features as the networks see them [N, 2 H]: through their first layers, which weigh what matters for motion and
    presence and ignore the directions left over from the random start.
    """
    features = mixture.gaussians.features
    return torch.cat([net.from_feature(features) for net in (mixture.shift, mixture.occupancy)], dim=1).numpy()


def seed_second(mixture: CoarseMixture, parts: Parts, latents: Tensor, config: RunConfig, box: int) -> Mixture:
    """Stage 2 before training, of images of `box` pixels: Gaussians drawn from the coarse ones, over all sampled latents in
    proportion to their mass there; so a part that is absent in one state is still found in the others.
    """
    rng = np.random.default_rng((config.seed, 2))
    samples = sample_latents(latents, config.seed)
    centres, masses = summarise(mixture, samples)
    seed = _hierarchy if config.stage2.hierarchy else _flat
    found = seed(mixture, parts, (samples, centres, masses), config, box, rng)
    gaussians = found.gaussians
    total = float(masses.mean(0).sum()) / float((gaussians.widths_px().detach() ** 3).sum())
    gaussians.unit.fill_(total / float(torch.sigmoid(found.occupancy.last.bias.detach())[0]))
    return found


def _hierarchy(
    mixture: CoarseMixture,
    parts: Parts,
    seen: tuple[Tensor, Tensor, Tensor],
    config: RunConfig,
    box: int,
    rng: np.random.Generator,
) -> HierarchicalMixture:
    """Anchors that already follow the parts' motion of stage 1, and Gaussians carried back into their anchor's frame.

    What was `seen`: latents [S, L], and there centres [S, N, 3] and masses [S, N] of the coarse Gaussians.
    """
    samples, centres, masses = seen
    anchors, anchor_of = torch.from_numpy(parts.anchors), torch.from_numpy(parts.anchor_of)
    own = mixture.gaussians
    anchor_centres, anchor_features = centres[0, anchors], own.features.detach()[anchors]
    widths = own.widths_px().detach()

    # The motion network first learns on the coarse Gaussians themselves, held rigidly to their anchors.
    order = torch.argsort(anchor_of, stable=True)
    rigid = HierarchicalMixture(
        Gaussians((centres[0] - anchor_centres[anchor_of])[order], widths[order], torch.zeros_like(own.features)),
        anchor_of[order], anchor_centres, anchor_features, config.latent.dimension, config.stage2,
    )  # fmt: skip
    _distil(rigid, samples, centres[:, order], masses[:, order], config.stage2, rng)

    state, parent = _drawn(masses, config.stage2.gaussians, rng)
    by_anchor = torch.argsort(anchor_of[parent], stable=True)
    state, parent = state[by_anchor], parent[by_anchor]
    with torch.no_grad():
        rotations, moved = rigid.anchor_motion(samples)
        a = anchor_of[parent]
        relative = centres[state, parent] - moved[state, a]
        offsets = (rotations[state, a].transpose(1, 2) @ relative[:, :, None])[..., 0]
    offsets = offsets + _jitter(widths[parent], rng)
    fixed = config.feature_kind == "position"
    features = torch.zeros(len(parent), config.features)
    if fixed:
        features = position_features(anchor_centres[a] + offsets, box, config.features) - anchor_features[a]
    gaussians = Gaussians(offsets, _narrower(widths, parent), features, fixed_features=fixed)
    hierarchy = HierarchicalMixture(
        gaussians, a, anchor_centres, anchor_features, config.latent.dimension, config.stage2
    )
    hierarchy.motion.load_state_dict(rigid.motion.state_dict())
    return hierarchy


def _flat(
    mixture: CoarseMixture,
    parts: Parts,
    seen: tuple[Tensor, Tensor, Tensor],
    config: RunConfig,
    box: int,
    rng: np.random.Generator,
) -> CoarseMixture:
    """More Gaussians with larger networks, each like its parent, where that is in the state that most others are near."""
    _, centres, masses = seen
    own = mixture.gaussians
    widths = own.widths_px().detach()
    parent = _drawn(masses, config.stage2.gaussians, rng)[1].sort().values
    points = centres[0, parent] + _jitter(widths[parent], rng)
    fixed = config.feature_kind == "position"
    features = position_features(points, box, config.features) if fixed else own.features.detach()[parent]
    gaussians = Gaussians(points, _narrower(widths, parent), features, fixed_features=fixed)
    anchor_of = torch.from_numpy(parts.anchor_of)[parent]
    return CoarseMixture(gaussians, config.latent.dimension, config.stage2, anchor_of)


def _drawn(masses: Tensor, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(state, coarse Gaussian) of each of `count` new Gaussians, drawn by masses [S, N]."""
    edges = np.cumsum(masses.double().flatten().numpy())
    drawn = np.searchsorted(edges, (np.arange(count) + rng.random(count)) * edges[-1] / count).clip(max=len(edges) - 1)
    state, parent = (torch.from_numpy(i) for i in np.unravel_index(drawn, masses.shape))
    return state, parent


def _jitter(widths: Tensor, rng: np.random.Generator) -> Tensor:
    return JITTER * widths[:, None] * torch.from_numpy(rng.standard_normal((len(widths), 3)).astype(np.float32))


def _narrower(widths: Tensor, parent: Tensor) -> Tensor:
    """Widths of Gaussians that are more in number than their parents."""
    return (widths[parent] * min(1.0, (len(widths) / len(parent)) ** (1 / 3))).clamp(min=0.6)


def _distil(
    rigid: HierarchicalMixture,
    samples: Tensor,
    centres: Tensor,
    masses: Tensor,
    config: HierarchyConfig,
    rng: np.random.Generator,
) -> None:
    """Teach the anchors the motion [S, N, 3] px of the coarse Gaussians, weighted by their mass, without images."""
    optimiser = torch.optim.Adam(rigid.motion.parameters(), lr=DISTIL_RATE)
    weights = masses / masses.mean(0).sum()
    for step in range(config.distil_steps):
        rows = torch.from_numpy(rng.integers(0, len(samples), DISTIL_BATCH))
        for group in optimiser.param_groups:
            group["lr"] = DISTIL_RATE * (1 - step / config.distil_steps)
        distances = (rigid.rigid_centres(samples[rows]) - centres[rows]).square().sum(-1)
        loss = (weights[rows] * distances).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
