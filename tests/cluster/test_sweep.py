"""Sweeps on a real Ray: killed and gone on with, better than chance, a population, and what comes out."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cluster.sweep import _stopping_all, sweep
from cluster.sweep_files import STARTS, STOP, read_lines, read_reports, trial_folder
from cluster.sweep_space import load_space
from spire_dist.config import dump_config, load_config
from spire_dist.distributed.holder import LOCK
from spire_dist.errors import ConfigError
from spire_dist.training.train import train

pytestmark = pytest.mark.slow

TRIALS = 8
SPACE = """
base = "base.toml"
[sweep]
trials = {trials}
search = "{search}"
grace = 0.25
interval = 0.5
at_once = 2
seed = 3
[space]
"stage1.rates.centres_px" = {{log = [0.0005, 0.5]}}
"stage2.rates.amplitudes" = {{log = [0.0002, 0.2]}}
latent.weight = {{choice = [0.05, 0.1, 0.2]}}
"""
"""Step sizes over three orders of magnitude, of which most are too small to get anywhere in 64 steps."""


@pytest.fixture(scope="module")
def folder(tiny_settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    pytest.importorskip("ray", reason="needs the extra [ray]")
    (folder / "base.toml").write_text(dump_config(load_config(overrides=tiny_settings)))
    for name, search, trials in (("asha", "asha", TRIALS), ("pbt", "pbt", 4)):
        (folder / f"{name}.toml").write_text(SPACE.format(search=search, trials=trials))
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen:
    """`spire-dist sweep` with a home of its own, in which Ray is to leave nothing."""
    (folder / "home").mkdir(exist_ok=True)
    log = (folder / "sweep.log").open("ab")
    environment = os.environ | {"HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "spire_dist.cli", "sweep", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def finish(folder: Path, process: subprocess.Popen) -> None:
    assert process.wait(400) == 0, (folder / "sweep.log").read_text()


def trials_in(out: Path) -> list[Path]:
    return sorted((out / "trials").iterdir())


def starts(run: Path) -> int:
    return len(read_lines(run / STARTS))


def results(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def killed(folder) -> Iterator[tuple[Path, dict[Path, int]]]:
    """A sweep by ASHA that was killed with all of Ray, while trials trained, and gone on with; and starts of trials before."""
    out = folder / "asha"
    process = start(folder, "asha.toml", "asha")
    try:
        wait_until(lambda: len(list(out.glob("trials/*/reports.jsonl"))) >= 4, process, folder / "sweep.log")
        family = psutil.Process(process.pid).children(recursive=True)
        training = [child for child in family if "cluster.trial_process" in " ".join(_words(child))]
        for victim in (psutil.Process(process.pid), *(child for child in family if child not in training)):
            victim.kill()  # the trials' own processes must notice by themselves
        psutil.wait_procs(family, 60)
        process.wait()
        before = {run: starts(run) for run in trials_in(out)}
        yield_after = start(folder, "asha.toml", "asha", "--resume")
        finish(folder, yield_after)
        yield out, before
    finally:
        process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_after_a_kill_no_report_is_made_twice_and_all_trials_are_judged(killed):
    out, before = killed
    assert len(trials_in(out)) == TRIALS
    stopped_or_done = 0
    for run in trials_in(out):
        reports = read_reports(run)
        shares = [report["share"] for report in reports]
        assert shares == [0.25, 0.75, 1.0][: len(shares)]
        assert shares
        assert all("failed" not in report for report in reports)
        # Every process made one report, but for those that were killed.
        assert len(shares) <= starts(run) <= len(shares) + (1 if run in before else 0)
        stopped_or_done += shares[-1] == 1 or starts(run) == len(shares)
    assert stopped_or_done >= TRIALS - 2
    rows = results(out)
    assert {row["state"] for row in rows} == {"done", "stopped"}
    assert [float(row["loss"]) for row in rows if row["state"] == "done"] == sorted(
        float(row["loss"]) for row in rows if row["state"] == "done"
    )


def test_ray_leaves_nothing_in_the_home_directory(folder, killed):
    left = [str(path.relative_to(folder / "home")) for path in (folder / "home").rglob("*")]
    assert not [name for name in left if "ray" in name.lower()]


def test_the_picture_is_drawn_and_the_best_trains_on_all_particles(killed, tmp_path):
    out, _ = killed
    pixels = np.asarray(Image.open(out / "sweep.png").convert("RGB"))
    assert (pixels == (214, 39, 40)).all(axis=2).sum() > 500  # the best one's line
    best = load_config(out / "best.toml", overrides=["stage1.epochs=0.5", "stage2.epochs=0.5"])
    first = results(out)[0]
    assert best.stage1.rates.centres_px == float(first["stage1.rates.centres_px"])
    assert best.latent.weight == float(first["latent.weight"])
    train(best, tmp_path / "run")
    assert len(np.load(tmp_path / "run" / "latents.npy")) == 240


def test_stopping_early_beats_chance_with_the_same_steps(folder, killed):
    """The same seed: random search trains the first of the same configurations, each to its end, for at least as many steps."""
    rows = results(killed[0])
    spent = sum(float(row["share"]) for row in rows)
    trials = int(np.ceil(spent))
    assert trials < TRIALS
    (folder / "random.toml").write_text(SPACE.format(search="random", trials=trials))
    finish(folder, start(folder, "random.toml", "random"))
    chance = results(folder / "random")
    assert sum(int(row["steps"]) for row in chance) >= sum(int(row["steps"]) for row in rows)
    assert float(rows[0]["loss"]) < float(chance[0]["loss"])


def test_a_population_exchanges_states_also_across_a_stop(folder):
    out = folder / "pbt"
    process = start(folder, "pbt.toml", "pbt")
    wait_until(lambda: len(list(out.glob("trials/*/reports.jsonl"))) >= 2, process, folder / "sweep.log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 75
    assert (
        "stopped by SIGTERM; go on with: spire-dist sweep pbt.toml pbt --resume" in (folder / "sweep.log").read_text()
    )
    finish(folder, start(folder, "pbt.toml", "pbt", "--resume"))
    rows = results(out)
    assert [row["state"] for row in rows] == ["done"] * 4
    [child] = [row for row in rows if row["parent"]]
    run, parent = trial_folder(out, int(child["trial"])), trial_folder(out, int(child["parent"]))
    halves, ends = ([read_reports(folder)[place] for folder in (run, parent)] for place in (0, 1))
    assert halves[0]["loss"] > halves[1]["loss"]  # it was behind
    assert ends[0]["settings"] != ends[1]["settings"] != halves[0]["settings"]
    assert load_config(run / "config.toml").stage2.rates.amplitudes == ends[0]["settings"]["stage2.rates.amplitudes"]
    assert [report["share"] for report in read_reports(run)] == [0.5, 1.0]


def test_a_stop_ends_ray_only_when_all_trials_have_saved(tmp_path):
    run = trial_folder(tmp_path, 0)
    run.mkdir(parents=True)
    ended: list[int] = []

    def heard(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
        return bool(ended)

    with _stopping_all(tmp_path) as asked, open(run / LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a trial that saves
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        assert (tmp_path / STOP).exists()
        # As Ray's loop, which may begin after the signal came.
        signal.signal(signal.SIGUSR1, lambda *_: ended.append(1))
        assert not heard(1)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert heard(30)


def test_folders_and_files_that_do_not_fit_are_refused(folder, killed, tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(folder)
    out, space = killed[0], folder / "asha.toml"
    refusal(ConfigError, [str(out), "--resume"], lambda: sweep(space, out))
    refusal(ConfigError, ["no sweep to go on with"], lambda: sweep(space, tmp_path / "new", resume=True))
    changed = folder / "changed.toml"
    changed.write_text(space.read_text().replace("seed = 3", "seed = 4"))
    refusal(ConfigError, ["sweep.seed = 4", "begun with 3"], lambda: sweep(changed, out, resume=True))
    changed.write_text(space.read_text().replace("at_once = 2", "ranks = 5"))
    refusal(ConfigError, ["batch = 32", "5 ranks"], lambda: sweep(changed, tmp_path / "new"))
    changed.write_text(space.read_text().replace("at_once = 2", "cpus = 4096"))
    refusal(ConfigError, ["4096 cores", "lower ranks, cpus or gpus"], lambda: sweep(changed, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_drawn_configurations_are_those_of_the_seed(folder, killed):
    drawn: list[dict[str, Any]] = load_space(folder / "asha.toml").draws()
    for row in results(killed[0]):
        settings = drawn[int(row["trial"])]
        assert json.loads(json.dumps(settings)) == {key: type(value)(row[key]) for key, value in settings.items()}
