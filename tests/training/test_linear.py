"""The linear model that latents start from: sections by the analytic transform of a Gaussian, both halves of a round by sums
written out, and latents of made images by what these were made with."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from spire_dist.config import load_config
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import ALONE
from spire_dist.distributed.mesh import Mesh
from spire_dist.physics.projector import project
from spire_dist.training.linear import (
    FITTED,
    FLOOR,
    PADDING,
    Sections,
    Space,
    Sums,
    coordinates,
    cut_sections,
    fitted_rows,
    linear_latents,
    rings,
    side,
)
from spire_dist.training.saving import load_trainee, read_state
from spire_dist.training.trainer import learn, training_order

CPU = torch.device("cpu")
BOX = 24


def poses(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations [count, 3, 3] and shifts [count, 2] px."""
    turned = Rotation.random(count, random_state=rng).as_matrix()
    return torch.tensor(turned).float(), torch.tensor(rng.uniform(-2, 2, (count, 2))).float()


def images_of(centres: torch.Tensor, amplitudes: torch.Tensor, width: float, seed: int, noise: float) -> Batch:
    """A batch of images of Gaussians [N, 3] px with amplitudes [B, N], with a CTF of some zeros and white noise."""
    rng, count = np.random.default_rng(seed), len(amplitudes)
    rotations, shifts = poses(count, rng)
    projections = project(centres, amplitudes, torch.full((len(centres),), width), rotations, shifts, BOX, 1.0, 6.0)
    radius = torch.fft.rfftfreq(BOX)[None, :].square() + torch.fft.fftfreq(BOX)[:, None].square()
    ctf = torch.cos(torch.from_numpy(rng.uniform(10, 30, (count, 1, 1))).float() * radius)
    images = ctf * torch.fft.rfft2(projections) + torch.fft.rfft2(
        noise * torch.from_numpy(rng.normal(size=(count, BOX, BOX))).float()
    )
    return Batch(torch.arange(count), images, ctf, rotations, shifts, count)


def test_a_section_holds_the_transform_of_the_map_where_it_says():
    centre, width, amplitude = torch.tensor([[3.0, -2.0, 1.5]]), 1.6, 0.7
    batch = images_of(centre, torch.full((7, 1), amplitude), width, 0, noise=0.0)
    found, grid = cut_sections(batch), side(BOX)
    depth = grid // 2 + 1
    where = torch.stack([found.voxels // depth % grid, found.voxels // depth // grid, found.voxels % depth], dim=-1)
    where = torch.where(where > grid // 2, where - grid, where).double()
    where = torch.where(found.mirrored[..., None], -where, where) / (PADDING * BOX)  # cycles per pixel, to half a voxel
    planar = where @ batch.rotations.double().transpose(1, 2)
    assert planar[..., 2].abs().max() < 0.9 / (PADDING * BOX)
    assert ((planar[..., :2].norm(dim=-1) * BOX).max() - rings(BOX)).abs() < 0.5
    mass = amplitude * (2 * math.pi) ** 1.5 * width**3
    expected = (
        mass
        * torch.exp(-2 * (math.pi * width * where.norm(dim=-1)) ** 2)
        * torch.exp(-2j * math.pi * (where @ centre[0].double()))
    )
    # a voxel is up to 0.87 of 1 / 48 cycles away, which turns the phase of a Gaussian 4 px off the centre by half a radian
    difference = (found.values * BOX - found.ctf * expected).abs().pow(2).mean().sqrt() / (
        found.ctf * expected
    ).abs().pow(2).mean().sqrt()
    assert difference < 0.25
    assert torch.unique(found.voxels[0]).numel() > 0.8 * found.voxels.shape[1]


def random_sections(images: int, coefficients: int, voxels: int, rng: np.random.Generator) -> Sections:
    values = torch.complex(*torch.from_numpy(rng.normal(size=(2, images, coefficients))).float())
    ctf = torch.from_numpy(rng.uniform(-1, 1, (images, coefficients))).float()
    where = torch.from_numpy(rng.integers(0, voxels, (images, coefficients)))
    return Sections(values, ctf, where, torch.from_numpy(rng.random((images, coefficients)) < 0.5))


def test_latents_are_the_posterior_of_a_linear_model_and_maps_solve_its_normal_equations():
    rng = np.random.default_rng(1)
    sections = random_sections(5, 12, 4, rng)
    maps = torch.complex(*torch.from_numpy(rng.normal(size=(2, 4, 3))).float())
    z, covariance = coordinates(sections, maps)
    sums = Sums(4, 2)
    sums.add(sections, z, covariance)
    found = sums.maps(Mesh())
    matrices, pulls = np.zeros((4, 3, 3)), np.zeros((4, 3), complex)
    for i in range(5):
        voxels, mirrored = sections.voxels[i].numpy(), sections.mirrored[i].numpy()
        ctf, values = sections.ctf[i].double().numpy(), sections.values[i].numpy().astype(complex)
        seen = maps.numpy().astype(complex)[voxels]
        seen = ctf[:, None] * np.where(mirrored[:, None], seen.conj(), seen)
        design = np.concatenate([seen.real, seen.imag]) * math.sqrt(2)
        target = np.concatenate([values.real, values.imag]) * math.sqrt(2) - design[:, 0]
        inverse = np.linalg.inv(design[:, 1:].T @ design[:, 1:] + np.eye(2))
        np.testing.assert_allclose(covariance[i], inverse, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(z[i], inverse @ design[:, 1:].T @ target, rtol=1e-4, atol=1e-5)
        extended = np.concatenate([[1.0], z[i].double().numpy()])
        second = np.outer(extended, extended)
        second[1:, 1:] += covariance[i].numpy()
        for voxel, c, value, turned in zip(voxels, ctf, values, mirrored, strict=True):
            matrices[voxel] += c**2 * second
            pulls[voxel] += c * (value.conjugate() if turned else value) * extended
    floor = FLOOR * matrices[:, 0, 0].mean() + 1e-6
    expected = np.linalg.solve(matrices + floor * np.eye(3), pulls[..., None])[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_what_lies_outside_of_the_sphere_goes_and_what_is_inside_stays():
    space = Space(BOX)
    real = torch.randn(space.side, space.side, space.side, 2, generator=torch.Generator().manual_seed(0))
    once = space.transform(real)
    torch.testing.assert_close(space.confined(once), once, rtol=1e-3, atol=1e-2)
    assert 0 < space.inside.mean() < 0.1


class Made:
    """Stands for a source: a particle has two blobs that come and go, each on its own, beside a body that stays."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(5)
        self.truth = torch.from_numpy(rng.normal(size=(count, 2))).float()
        centres = torch.tensor([[0.0, 0, 0], [2, 2, 0], [-5, 1, 2], [2, -5, -3]])
        weights = torch.cat([torch.ones(count, 2), 1 + 0.5 * self.truth], dim=1)
        self.whole = images_of(centres, 0.5 * weights, 1.5, 6, noise=1.0)
        blobs = [images_of(centres[[i]], torch.full((count, 1), 0.25), 1.5, 6, noise=0.0).images for i in (2, 3)]
        seen = torch.fft.irfft2(torch.stack(blobs, dim=1), s=(BOX, BOX)).flatten(2)  # of the same poses and CTFs
        covariance = torch.linalg.inv(seen @ seen.transpose(1, 2) + torch.eye(2))
        self.best = 1 - covariance.diagonal(dim1=1, dim2=2).mean(0)
        """The share of the truth's variance that images in this noise can tell, were the blobs known."""
        self.store = type("Store", (), {"count": count, "box": BOX, "images_per_chunk": 64})

    def batch(self, rows: np.ndarray) -> Batch:
        whole = self.whole
        chosen = (getattr(whole, name)[rows] for name in ("rows", "images", "ctf", "rotations", "shifts_px"))
        return Batch(*chosen, total=len(rows))


@pytest.mark.parametrize(("count", "per_chunk"), [(5, 64), (1000, 64), (40_000, 64), (335_240, 64), (99_999, 16)])
def test_maps_are_fitted_to_whole_chunks_over_the_whole_store(count: int, per_chunk: int):
    rows = fitted_rows(count, per_chunk)
    assert len(rows) == len(np.unique(rows)) <= FITTED
    assert len(rows) == count or len(rows) > FITTED - 2 * per_chunk
    assert rows[-1] == count - 1
    chunks = np.unique(rows // per_chunk)
    assert np.diff(chunks).max(initial=1) <= count / FITTED + 2
    assert len(rows) > (len(chunks) - 1) * per_chunk


def test_latents_of_made_images_tell_what_these_were_made_with():
    made = Made(6000)
    found = torch.from_numpy(linear_latents(made, 2, 0, Mesh()))  # pyright: ignore[reportArgumentType]
    assert found.shape == (6000, 2)
    assert found.std() == pytest.approx(1, abs=0.05)
    design = torch.cat([found, torch.ones(6000, 1)], dim=1)
    residuals = made.truth - design @ torch.linalg.lstsq(design, made.truth).solution
    explained = 1 - residuals.var(0) / made.truth.var(0)
    assert made.best.min() > 0.7
    assert (explained > made.best - 0.05).all()


@pytest.fixture(scope="module")
def held(tmp_path_factory, train_tiny) -> Path:
    """A run whose latents start from the linear model."""
    return train_tiny(tmp_path_factory.mktemp("linear") / "run", "latent.linear=0.4", "latent.dimension=3")


def test_a_whole_run_starts_from_it(held):
    latents = np.load(held / "latents.npy")
    assert latents.shape[1] == 3
    assert np.isfinite(latents).all()


def test_latents_that_are_held_stay_while_the_model_learns(held):
    config = load_config(held / "config.toml")
    source = BatchSource(ParticleStore.open(config.data.store))
    before = read_state(held, ALONE)
    assert before is not None
    assert before.latents is not None
    trainee = load_trainee(held, source, config, Mesh(), CPU)
    trainee.step = 0
    batch = next(source.training(training_order(source, config, 2), 0, 0, 1))
    learn(trainee, batch, config, 1.0, False, held=True)
    assert trainee.table is not None
    trainee.table.come_home()
    assert torch.equal(trainee.table.home, before.latents)
    after = trainee.engine.parameters()
    assert any(not torch.equal(after[name], before.model[name]) for name in after)
    learn(trainee, batch, config, 1.0, False)
    trainee.table.come_home()
    assert not torch.equal(trainee.table.home, before.latents)
