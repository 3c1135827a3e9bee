"""`spire-dist benchmark` from a released set to its tables, stopped on the way."""

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spire_dist.cli import app
from spire_dist.config import load_config
from spire_dist.errors import ConfigError, Stopped
from spire_dist.results import evaluate
from spire_dist.training import train as train_module
from tests.comparison.test_leaderboard import tables
from tests.training.test_resume import assert_same_results, at_step


@pytest.fixture
def words(released: Path, tiny_settings: list[str], tmp_path: Path) -> list[str]:
    """The command line of a comparison of seconds."""
    settings = [f"--set={setting}" for setting in tiny_settings if not setting.startswith("data.store")]
    return ["benchmark", str(released), "--out", str(tmp_path / "out"), "--images", "12", *settings]


def invoke(words: list[str]) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.slow
def test_two_methods_and_a_rival_end_in_one_table_and_a_stopped_call_goes_on(
    words: list[str], released: Path, stand_in: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch
):
    out = tmp_path / "out"
    both = [*words, "--methods", "ours,no-hierarchy"]
    monkeypatch.setattr("spire_dist.comparison.moments.SAVE_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        at_step(patch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))  # 8 steps are those that compile
        with pytest.raises(Stopped):
            invoke(both)
    assert not (out / "ours-0" / "score.json").exists()
    assert (out / "ours-0" / "latest").exists()
    page = invoke(both)
    here, _ = tables(page)
    assert here["run here"][:3] == ["ours", "- its stage 1 alone", "- without hierarchy"]
    whole = tmp_path / "whole"
    train_module.train(load_config(overrides=[*tiny_settings, f"data.store='{out / 'store'}'"]), whole)
    assert_same_results(out / "ours-0", whole)
    known = evaluate.evaluate(whole, released, images=12)
    assert here["masked: AUC"][0] == f"{known['scores']['per_conformation/model_masked']['mean']:.4f}"
    assert here["per image, unmasked"][0] == f"{known['scores']['per_image/model_unmasked']['mean']:.4f}"
    assert here["Rand index"][0] == f"{known['classes']['adjusted_rand_index']:.3f}"

    def refuse(*_: object) -> None:
        raise AssertionError("trained or scored again")

    monkeypatch.setattr(train_module, "_train_both", refuse)
    monkeypatch.setattr("spire_dist.comparison.benchmark._compile", refuse)
    rival = ["--methods", "ours,cryodrgn-128x2", "--cryodrgn", str(stand_in), "--epochs", "4"]
    here, _ = tables(invoke([*words, *rival]))
    assert here["run here"][3] == "cryoDRGN 128 × 2"
    assert here["masked: AUC"][3] == here["masked: AUC"][-1] == "0.4583"  # the stand-in knows the truth
    runs = json.loads((out / "benchmark.json").read_text())["runs"]
    first = next(run["earlier"] for run in runs if run["method"] == "ours")
    assert [point["at"].split(",")[0] for point in first] == [*["stage 1"] * 4, *["stage 2"] * 3]
    assert first[3]["at"] == "stage 1"
    seconds = [point["training_s"] for point in first]
    assert seconds == sorted(seconds)
    assert len({point["result"]["scores"]["per_conformation/model_masked"]["mean"] for point in first}) == 7
    early = next(run["earlier"] for run in runs if run["method"] == "cryodrgn-128x2")
    assert [(point["at"], point["training_s"]) for point in early] == [("epoch 1", 2.0), ("epoch 2", 4.0)]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--methods", "cryodrgn-128x2"], ["--cryodrgn"]),
        (["--seeds", "x"], ["--seeds x"]),
        (["--set", "stage1.epoch=3"], ["stage1.epoch"]),
        (["--preset", "nothing"], ["nothing", "demo"]),
        (["--minutes", "0"], ["minutes 0"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    words: list[str], more: list[str], named: list[str], tmp_path, refusal
):
    refusal(ConfigError, named, lambda: invoke([*words, *more]))
    assert not (tmp_path / "out").exists()
