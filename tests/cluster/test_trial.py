"""What a trial does between two reports, without Ray: it stops itself at an exact step, is judged, and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.sweep_files import (
    CONFIG,
    ORIGIN,
    STARTS,
    STOP,
    VIEW,
    read_lines,
    read_reports,
    trial_folder,
    write_reports,
    write_sweep,
)
from cluster.sweep_space import Space, load_space
from cluster.trial_process import report, steps_of
from spire_dist.config import dump_config, load_config
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import training_view
from spire_dist.results.evaluate import score
from spire_dist.training.run import load_run
from spire_dist.training.saving import read_state
from spire_dist.training.train import train

KEPT = 200


@pytest.fixture(scope="module")
def base(tiny_settings, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.toml"
    path.write_text(dump_config(load_config(overrides=tiny_settings)))
    return path


def begin(out: Path, base: Path, sweep: dict[str, Any]) -> Space:
    """A sweep's folder with one trial in it."""
    out.mkdir()
    lines = [f"{key} = {json.dumps(value)}" for key, value in sweep.items()]
    path = out / "space.toml"
    path.write_text(f'base = "{base}"\n[sweep]\n' + "\n".join(lines) + "\n[space]\nlatent.weight = {choice = [0.1]}\n")
    space = load_space(path)
    write_sweep(out, space.as_dict())
    if space.sweep.metric == "loss":
        training_view(ParticleStore.open(space.base.data.store), out / VIEW, KEPT)
    trial_folder(out, 0).mkdir()
    (trial_folder(out, 0) / ORIGIN).write_text('{"settings": {"latent.weight": 0.1}}')
    (trial_folder(out, 0) / CONFIG).write_text(dump_config(space.trial_config(out, {"latent.weight": 0.1})))
    return space


@pytest.mark.parametrize("kind", ["table", "encoder+table"])
def test_a_trial_that_stops_for_reports_ends_in_the_bits_of_one_that_does_not(tmp_path, base, kind):
    config = tmp_path / "base.toml"
    config.write_text(base.read_text().replace('kind = "table"', f'kind = "{kind}"'))
    out = tmp_path / "out"
    begin(out, config, {})
    run = trial_folder(out, 0)
    settings = load_config(run / CONFIG)
    first, second = steps_of(settings, KEPT)
    for share in (0.3, 0.8, 1.0):
        report(out, 0, share)
        state = read_state(run)
        assert state is not None
        assert state.step + (first if state.stage == 2 else 0) == round(share * (first + second))
    train(settings, tmp_path / "whole")
    np.testing.assert_array_equal(np.load(run / "latents.npy"), np.load(tmp_path / "whole" / "latents.npy"))
    reports = read_reports(run)
    assert [r["share"] for r in reports] == [0.3, 0.8, 1.0]
    assert reports[-1]["settings"] == {"latent.weight": 0.1}
    assert reports[-1]["loss"] < reports[0]["loss"]
    assert json.loads((run / "STATUS.json").read_text())["state"] == "complete"


def test_auc_is_that_of_evaluation_and_there_is_one_on_the_way_too(tmp_path, base, tiny_truth):
    out = tmp_path / "out"
    begin(out, base, {"metric": "auc", "truth": str(tiny_truth)})
    for share in (0.4, 1.0):
        report(out, 0, share)
    early, late = (r["auc"] for r in read_reports(trial_folder(out, 0)))
    assert 0.2 < early < 1
    scores = score(load_run(trial_folder(out, 0)), tiny_truth, images=0)[0]["scores"]
    assert late == scores["per_conformation/model_masked"]["mean"] != early


def process(out: Path, share: float) -> subprocess.Popen:
    command = [sys.executable, "-m", "cluster.trial_process", str(out), "0", str(share)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})


@pytest.mark.slow
def test_several_ranks_stop_after_the_same_step(tmp_path, base):
    out = tmp_path / "out"
    begin(out, base, {"ranks": 2})
    assert process(out, 0.5).wait(240) == 0
    run = trial_folder(out, 0)
    first, second = steps_of(load_config(run / CONFIG), KEPT)
    [found] = read_reports(run)
    assert found["steps"] == round(0.5 * (first + second))
    assert "2 ranks" in (run / "train.log").read_text()


@pytest.mark.slow
def test_a_trial_saves_and_leaves_when_the_sweep_is_to_stop(tmp_path, base):
    config = tmp_path / "base.toml"
    config.write_text(base.read_text().replace("epochs = 5.0", "epochs = 5000.0"))
    out = tmp_path / "out"
    begin(out, config, {})
    run = trial_folder(out, 0)
    going = process(out, 1.0)
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert going.poll() is None, (run / "train.log").read_text()
        (out / STOP).touch()
        assert going.wait(120) == 75
    finally:
        going.kill()
    state = read_state(run)
    assert state is not None
    assert state.step > 0
    assert read_reports(run) == []
    assert len(read_lines(run / STARTS)) == 1


def actor(out: Path) -> Any:
    """Ray's side of trial 0, in this process."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    from cluster.trial import Trial

    code = str(Path(__file__).parents[2])
    of_one = type("OfOne", (Trial,), {"trial_id": "sweep_00000"})  # which Ray would have told it
    return of_one({"out": str(out), "settings": {"latent.weight": 0.1}, "code": code})


@pytest.mark.slow
def test_settings_that_make_the_loss_no_number_end_the_trial_and_not_the_sweep(tmp_path, base):
    config = tmp_path / "base.toml"
    config.write_text(base.read_text().replace("centres_px = 0.05", "centres_px = 1e38"))
    out = tmp_path / "out"
    begin(out, config, {"search": "random"})
    result = actor(out).step()
    assert result["done"]
    assert result["loss"] == float("inf")
    [told] = read_reports(trial_folder(out, 0))
    assert "the loss is not finite" in told["failed"]
    assert actor(out).step()["done"]  # and is not tried again
    assert len(read_lines(trial_folder(out, 0) / STARTS)) == 1


def test_no_trial_begins_once_the_budget_is_used_up(tmp_path, base):
    out = tmp_path / "out"
    begin(out, base, {"budget": 1.5})
    for number, share in ((1, 1.0), (2, 0.5)):
        trial_folder(out, number).mkdir()
        write_reports(trial_folder(out, number), [{"share": 0.25, "loss": 2.0}, {"share": share, "loss": 1.0}])
    result = actor(out).step()
    assert (result["permille"], result["done"]) == (0, True)
    assert not (trial_folder(out, 0) / STARTS).exists()
