"""Runs that were stopped, crashed or killed end in the same bits as a run left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from spire_dist.config import dump_config, load_config
from spire_dist.errors import Stopped
from spire_dist.training import train as train_module
from spire_dist.training import trainer
from spire_dist.training.saving import read_state

RESULTS = ("latents.npy", "parts.npy", "stage1/latents.npy", "stage1/parts.npy")
FIRST, SECOND = 40, 24  # steps of the two stages


class Crash(BaseException):
    """Stands for the end of the process: nothing may be saved on the way out."""


def at_step(monkeypatch, wanted: int, act) -> None:
    """Do `act` within the `wanted`-th step from here on."""
    original, steps = trainer.learn, []

    def learn(*arguments):
        found = original(*arguments)
        steps.append(1)
        if len(steps) == wanted:
            act()
        return found

    monkeypatch.setattr(trainer, "learn", learn)


def crash():
    raise Crash


def assert_same_results(run, other) -> None:
    for name in RESULTS:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    first, second = read_state(run), read_state(other)
    assert first is not None
    assert second is not None
    assert first.step == second.step
    for one, two in ((first.model, second.model), (first.memory, second.memory)):
        assert all(torch.equal(one[name], two[name]) for name in one | two)
    for one, two in ((first.latents, second.latents), (first.poses, second.poses)):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def kind_of(run) -> str:
    return f"latent.kind='{load_config(run / 'config.toml').latent.kind}'"


@pytest.mark.parametrize("step", [20, FIRST, FIRST + SECOND])
def test_stopped_and_continued_is_the_same_to_the_bit(finished, tmp_path, train_tiny, monkeypatch, step):
    run, kind = tmp_path / "run", kind_of(finished)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="SIGTERM"):
            train_tiny(run, kind)
    status = json.loads((run / "STATUS.json").read_text())
    stage, within = (1, step) if step <= FIRST else (2, step - FIRST)
    assert (status["state"], status["stage"], status["step"]) == ("stopped", stage, within)
    train_tiny(run, kind)
    assert_same_results(run, finished)


@pytest.mark.parametrize("step", [FIRST, FIRST + 1])
def test_crashed_and_continued_is_the_same_to_the_bit(finished, tmp_path, train_tiny, monkeypatch, step):
    run, settings = tmp_path / "run", (kind_of(finished), "output.save_seconds=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Crash):
            train_tiny(run, *settings)
    assert not (run / "latents.npy").exists()
    train_tiny(run, *settings)
    assert_same_results(run, finished)


def test_refined_poses_go_on_to_the_same_bits(tmp_path, train_tiny, monkeypatch):
    """Stopped before refinement begins, while the model rests, and after that, in the middle of an epoch."""
    settings = ("poses.refine=true", "poses.start=0.3", "poses.rigid_epochs=1")  # from step 7 on, and from 15
    alone = train_tiny(tmp_path / "alone", *settings)
    for step in (FIRST + 3, FIRST + 10, FIRST + 18):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped):
                train_tiny(tmp_path / f"stopped-{step}", *settings)
        train_tiny(tmp_path / f"stopped-{step}", *settings)
        assert_same_results(tmp_path / f"stopped-{step}", alone)
        assert (tmp_path / f"stopped-{step}" / "poses.npz").read_bytes() == (alone / "poses.npz").read_bytes()


@pytest.mark.parametrize("where", ["consensus_map", "find_parts", "seed_second", "all_latents", "_write_results"])
@pytest.mark.parametrize("call", [1, 2])
def test_crashed_between_the_stages_and_continued_is_the_same_to_the_bit(
    finished_table, tmp_path, train_tiny, monkeypatch, where, call
):
    original, calls = getattr(train_module, where), []

    def crashing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Crash
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, where, crashing)
        try:
            train_tiny(tmp_path / "run")
        except Crash:
            train_tiny(tmp_path / "run")
    assert calls
    assert_same_results(tmp_path / "run", finished_table)


def test_crashes_over_and_over_lead_to_the_same_end(finished_table, tmp_path, train_tiny, monkeypatch):
    run, steps = tmp_path / "run", random.Random(0)
    for _ in range(40):
        with monkeypatch.context() as patch:
            at_step(patch, steps.randint(5, 20), crash)
            try:
                train_tiny(run, "output.save_seconds=1e-9")
                break
            except Crash:
                continue
    assert_same_results(run, finished_table)


def test_the_metrics_of_a_continued_run_go_on_in_time(finished_table, tmp_path, train_tiny, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 20, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "run")
    train_tiny(tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    where = [(record["stage"], record["step"]) for record in records]
    assert where == sorted(where)
    elapsed = [record["elapsed_s"] for record in records]
    assert elapsed == sorted(elapsed)


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_settings):
    """Starts `train` in a process of its own, on the configuration file `command.config` of some seconds."""
    settings = [
        *tiny_settings,
        "stage1.epochs=25",
        "stage2.epochs=15",
        "output.save_seconds=0.2",
        "output.log_seconds=0.1",
    ]
    config = tmp_path_factory.mktemp("command") / "config.toml"
    config.write_text(dump_config(load_config(overrides=settings)))

    def start(run) -> subprocess.Popen:
        words = [sys.executable, "-m", "spire_dist.cli", "train", str(config), "--run", str(run)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start.config = config
    return start


def wait_for_training(process, run, lines: int = 0) -> None:
    """Until the run has written more than `lines` metrics lines."""
    for _ in range(600):
        metrics = run / "metrics.jsonl"
        if process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > lines):
            return
        time.sleep(0.1)
    raise AssertionError("the process does not train")


@pytest.fixture(scope="module")
def left_alone(command, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train_module.train(load_config(command.config), run)
    return run


@pytest.mark.slow
def test_a_process_asked_to_stop_saves_and_leaves_with_75(command, left_alone, tmp_path, capsys):
    run = tmp_path / "run"
    process = command(run)
    wait_for_training(process, run)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in errors
    assert "run the same command to go on" in errors.splitlines()[-1]
    assert json.loads((run / "STATUS.json").read_text())["state"] == "stopped"
    train_module.train(load_config(command.config), run)
    assert "going on at stage" in capsys.readouterr().out
    assert_same_results(run, left_alone)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_the_same(command, left_alone, tmp_path):
    run, moments, lines = tmp_path / "run", random.Random(5), 0
    for _ in range(2):
        process = command(run)
        wait_for_training(process, run, lines)
        time.sleep(moments.uniform(0, 1))
        process.kill()
        process.communicate()
        lines = (run / "metrics.jsonl").read_text().count("\n")
    train_module.train(load_config(command.config), run)
    assert json.loads((run / "STATUS.json").read_text())["state"] == "complete"
    assert_same_results(run, left_alone)
    assert np.load(run / "latents.npy").shape == (240, 2)
