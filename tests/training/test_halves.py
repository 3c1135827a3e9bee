"""Two halves of a run: trained apart, stopped and continued to the same end, and what unseen particles say of them."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.halves import curves
from data_prep.convert import prepare
from spire_dist.config import load_config
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import HALVES, half_rows, half_view
from spire_dist.errors import ConfigError, RunError, Stopped
from spire_dist.results import plots_of_halves
from spire_dist.results.report import render_page, write_report
from spire_dist.results.validate import table, validate
from spire_dist.simulation.simulate import simulate
from spire_dist.training import trainer
from spire_dist.training.halves import half_folder
from spire_dist.training.run import load_run
from spire_dist.training.saving import read_state
from spire_dist.training.validation import held_out_gain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(finished_table, tmp_path_factory) -> Path:
    """A copy of the finished tiny run, to be validated."""
    return Path(shutil.copytree(finished_table, tmp_path_factory.mktemp("validated") / "run", symlinks=True))


@pytest.fixture(scope="module")
def result(run) -> dict:
    return validate(run)


def test_halves_are_ordinary_finished_runs_of_their_own_particles_map_and_seed(run, result, tiny_store):
    whole, seeds = ParticleStore.open(tiny_store), []
    for half in HALVES:
        folder = half_folder(run, half)
        config = load_config(folder / "config.toml")
        assert json.loads((folder / "STATUS.json").read_text())["state"] == "complete"
        store = ParticleStore.open(config.data.store)
        np.testing.assert_array_equal(store.read(np.arange(5)), whole.read(half_rows(whole, half)[:5]))
        assert len(np.load(folder / "latents.npy")) == store.count == result["halves"][half - 1]["particles"]
        seeds.append(config.seed)
        ours = load_config(run / "config.toml").model_dump(exclude={"seed", "data", "output"})
        assert config.model_dump(exclude={"seed", "data", "output"}) == ours
    assert len({*seeds, load_config(run / "config.toml").seed}) == 3
    first, second = ((half_folder(run, half) / "volumes" / "consensus.mrc").read_bytes() for half in HALVES)
    assert first != second


def test_the_comparison_is_written_told_and_drawn(run, result):
    assert json.loads((run / "validation.json").read_text()) == json.loads(json.dumps(result))
    assert (run / "validation.png").stat().st_size > 10_000
    assert len(result["maps"]) == load_config(run / "config.toml").output.volumes
    text = table(result)
    assert "\nmotion: correlation" in text
    assert all(row["map"] in text for row in result["maps"])
    assert plots_of_halves.validation(result).axes
    # Shells, by hand: 24 px of 16 Å.
    assert result["frequencies"] == pytest.approx(np.arange(13) / (24 * 16))
    # The molecule is the same in both halves, so coarse maps agree.
    assert min(result["curves"]["matched"][1:4]) > 0.8


def test_the_report_shows_it_beside_every_map(run, result, finished_table):
    page = write_report(run, frames=8, pixels=48).read_text()
    assert "<h2>Two halves</h2>" in page
    for row in result["maps"]:
        assert (
            f'<td><code>{row["map"]}</code></td><td class="n">{row["resolutions_a"]["matched"]["0.143"]:.2f}</td>'
            in page
        )
    assert page.count(" Å</div>") >= 8  # the stills, each with the resolution of the nearest map
    without = render_page(load_run(finished_table), finished_table, frames=2, pixels=48)
    assert "Two halves" not in without
    assert "validation" not in without


def test_a_known_truth_tells_how_far_to_trust_the_halves(run, result, tiny_truth):
    halves, own, one, rigid = curves(run, tiny_truth)
    assert halves.shape == own.shape == one.shape == rigid.shape == (4, 13)
    for found in (halves, own, one, rigid):
        assert found[:, 1:4].min() > 0.6  # the molecule's outline
        assert found.max() <= 1 + 1e-9
    assert own[:, 1:6].mean() > one[:, 1:6].mean()  # all particles know more than half of them


def test_a_finished_comparison_is_made_again_without_training(run, result, monkeypatch):
    monkeypatch.setattr(trainer, "learn", lambda *_: pytest.fail("trained again"))
    assert validate(run) == result


class Crash(BaseException):
    """Stands for the end of the process: nothing may be saved on the way out."""


def crash() -> None:
    raise Crash


@pytest.mark.parametrize(
    ("step", "act", "left"),
    [(10, lambda: os.kill(os.getpid(), signal.SIGTERM), Stopped), (50, crash, Crash)],
    ids=["stopped in the first half", "killed in the second"],
)
def test_stopped_or_killed_and_continued_is_the_same_comparison(
    run, result, finished_table, tmp_path, monkeypatch, step, act, left
):
    """A half has 20 and 12 steps."""
    copy = Path(shutil.copytree(finished_table, tmp_path / "run", symlinks=True))
    original, steps = trainer.learn, []

    def learn(*arguments):
        steps.append(1)
        if len(steps) == step:
            act()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learn", learn)
        with pytest.raises(left):
            validate(copy)
    assert not (copy / "validation.json").exists()
    manifests = [half_folder(copy, half) / "particles.zarr" / "manifest.json" for half in HALVES]
    before = [path.stat().st_mtime_ns for path in manifests]
    again = validate(copy)
    assert [path.stat().st_mtime_ns for path in manifests] == before
    assert json.dumps(again).replace(str(copy), str(run)) == json.dumps(result)


@pytest.mark.slow
def test_halves_trained_on_two_ranks_agree_as_those_on_one(result, finished_table, tmp_path):
    copy = Path(shutil.copytree(finished_table, tmp_path / "run", symlinks=True))
    again = validate(copy, processes=2)
    np.testing.assert_allclose(again["curves"]["consensus"], result["curves"]["consensus"], atol=1e-3)
    np.testing.assert_allclose(again["curves"]["matched"][1:4], result["curves"]["matched"][1:4], atol=0.05)


def test_what_cannot_be_validated_is_refused(finished_table, tmp_path, refusal, monkeypatch, train_tiny):
    refusal(RunError, ["not a run directory"], lambda: validate(tmp_path))
    copy = Path(shutil.copytree(finished_table, tmp_path / "run", symlinks=True))
    (copy / "latents.npy").unlink()
    refusal(RunError, ["training has not ended"], lambda: validate(copy))
    shutil.copy(finished_table / "latents.npy", copy)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    refusal(ConfigError, ["several ranks", "--processes", "halves/1"], lambda: validate(copy))
    assert not (copy / "halves").exists()


@pytest.fixture(scope="module")
def gain_of_unseen(tmp_path_factory, train_tiny):
    """Trains on one half of a simulated set of so many states; returns the gain on the other half, in nats, and its error."""

    def gain(states: int, *settings: str) -> tuple[float, float]:
        folder = tmp_path_factory.mktemp("states")
        truth = simulate(
            folder / "truth",
            states=states,
            particles=640,
            box=24,
            pixel_size=16.0,
            resolution=30.0,
            snr=1.0,
            shift_a=16.0,
        )
        store = ParticleStore.open(prepare(truth / "particles.star", folder / "store", sign="+"))
        known, unseen = (half_view(store, folder / f"half{half}.zarr", half) for half in HALVES)
        run = train_tiny(folder / "run", f"data.store='{known.path}'", *settings)
        state = read_state(run)
        assert state is not None
        latents = np.load(run / "latents.npy")
        found = held_out_gain(state, load_config(run / "config.toml"), unseen, latents, CPU)
        assert len(found) == unseen.count
        return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))

    return gain


def test_unseen_particles_of_a_moving_molecule_gain_by_latents_of_their_own(gain_of_unseen):
    mean, error = gain_of_unseen(4, "stage1.epochs=10", "stage2.epochs=10")
    assert mean > 5 * error > 0


@pytest.mark.parametrize("kind", ["table", "encoder"])
def test_unseen_particles_of_a_rigid_molecule_gain_nothing(gain_of_unseen, kind):
    mean, error = gain_of_unseen(1, "stage1.epochs=10", "stage2.epochs=10", f"latent.kind='{kind}'")
    assert mean < 2 * error
