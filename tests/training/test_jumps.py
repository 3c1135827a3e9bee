"""Latents that jump: what is tried, what is taken, and that particles led to a wrong state find back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spire_dist.config import load_config
from spire_dist.data.loader import Batch, BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import ALONE
from spire_dist.distributed.mesh import Mesh
from spire_dist.model.image_model import render, squared_residuals
from spire_dist.model.sharing import render_each
from spire_dist.training.jumps import better_latents, drawn_latents
from spire_dist.training.saving import load_trainee, mixture_from_state, read_state
from spire_dist.training.trainer import learn, training_order

CPU = torch.device("cpu")


def batch_of(rows: list[int], total: int) -> Batch:
    """Particles of which nothing but their rows counts."""
    zeros = torch.zeros(len(rows), 4, 3)
    return Batch(torch.tensor(rows, dtype=torch.long), zeros + 0j, zeros, zeros, zeros[:, 0, :2], total)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_a_particle_jumps_to_the_cheapest_and_only_where_that_is_cheaper_than_its_own(seed, particles, tries):
    rng = np.random.default_rng(seed)
    own, tried = (torch.from_numpy(rng.normal(size=(n, 3))) for n in (particles, tries))
    squared, others = (torch.from_numpy(rng.uniform(5, 10, n)) for n in (particles, (tries, particles)))
    jumps, to = better_latents(own, squared, tried, others, weight=0.4)
    for i in range(particles):
        costs = [0.5 * float(others[k, i]) + 0.4 * float(tried[k] @ tried[k]) for k in range(tries)]
        assert bool(jumps[i]) == (min(costs) < 0.5 * float(squared[i]) + 0.4 * float(own[i] @ own[i]))
        assert torch.equal(to[i], tried[int(np.argmin(costs))])


def test_what_is_tried_are_latents_of_the_step_and_others_at_another_step():
    rows = [7, 3, 11, 5]
    latents = torch.tensor([[float(row)] for row in rows])
    found = [drawn_latents(Mesh(), batch_of(rows, 4), latents, 4, 3, (0, 1, step)) for step in range(20)]
    assert {float(value) for drawn in found for value in drawn[:, 0]} == set(map(float, rows))
    # The order in which particles stand in the batch does not count, so that it may be another one on other ranks.
    turned = drawn_latents(Mesh(), batch_of(rows[::-1], 4), latents.flip(0), 4, 3, (0, 1, 5))
    assert torch.equal(turned, found[5])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_tiny) -> Path:
    """A trained run, at the end of its second stage."""
    return train_tiny(tmp_path_factory.mktemp("jumps") / "run", "stage2.epochs=6")


def test_each_tried_latent_is_rendered_in_the_pose_of_every_image(trained):
    state = read_state(trained, ALONE)
    config = load_config(trained / "config.toml")
    mixture, batch = (
        mixture_from_state(state, config),
        BatchSource(ParticleStore.open(config.data.store)).batch(np.arange(5)),
    )
    latents = torch.tensor([[0.5, -1.0], [2.0, 0.3]])
    poses, box = (batch.rotations, batch.shifts_px), batch.images.shape[-2]
    for latent, images in zip(latents, render_each(Mesh(), mixture, latents, *poses, box, 4.0), strict=True):
        torch.testing.assert_close(images, render(mixture, latent.expand(5, 2), *poses, box, 4.0))


def test_particles_led_astray_find_back_by_jumps_alone(trained):
    """Half of a step's particles get the latents of others; with no step size at all, tries bring their misfit down again."""
    config = load_config(trained / "config.toml", overrides=["stage2.tries=8"])
    source = BatchSource(ParticleStore.open(config.data.store))
    trainee = load_trainee(trained, source, config, Mesh(), CPU)
    trainee.step = 0
    batch = next(source.training(training_order(source, config, 2), 0, 0, 1))
    table = trainee.table
    assert table is not None
    table.visit(0)

    def misfit() -> float:
        projections = render(trainee.mixture, table(batch.rows), batch.rotations, batch.shifts_px, 24, 4.0)
        return float(squared_residuals(projections, batch.ctf, batch.images).sum())

    with torch.no_grad():
        good = misfit()
        astray = torch.arange(len(batch.rows)) % 2 == 0
        table.replace(batch.rows, astray, table(batch.rows).roll(1, 0))
        led_astray = misfit()
    assert led_astray > good + 5
    for _ in range(12):
        learn(trainee, batch, config, 0.0, False)
        trainee.step += 1
    with torch.no_grad():
        assert misfit() < good + 0.3 * (led_astray - good)
