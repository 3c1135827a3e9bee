"""Whole runs on several ranks, started as a user starts them: stopped, killed, hung; by our launcher and by torchrun."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from spire_dist.config import dump_config, load_config
from spire_dist.distributed.launch import launch
from spire_dist.training.saving import read_state

pytestmark = pytest.mark.ranks
RANKS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_settings):
    """A configuration file of some seconds of training."""
    settings = [*tiny_settings, "stage1.epochs=20", "stage2.epochs=15", "output.save_seconds=0.5",
                "output.log_seconds=0.2", "parallel.timeout_s=20"]  # fmt: skip
    path = tmp_path_factory.mktemp("launch") / "config.toml"
    path.write_text(dump_config(load_config(overrides=settings)))
    return path


def start(config: Path, run: Path, *options: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    words = [
        *launcher,
        "-m",
        *(["--"] if launcher[1:] else []),
        "spire_dist.cli",
        "train",
        str(config),
        "--run",
        str(run),
        *options,
    ]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Its ranks, by their number."""
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
    return sorted(
        (child for child in found if "train" in child.cmdline()), key=lambda child: int(child.environ()["RANK"])
    )


def wait_for_steps(process: subprocess.Popen, run: Path, lines: int = 1) -> None:
    """Until more than `lines` lines of metrics are there."""
    metrics = run / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") > lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no step is made")


def status(run: Path) -> dict:
    return json.loads((run / "STATUS.json").read_text())


def steps_of_ranks(run: Path) -> list[list[tuple[int, int]]]:
    files = sorted((run / "ranks").glob("rank-*.jsonl"))
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[(record["stage"], record["step"]) for record in rank] for rank in records]


@pytest.fixture(scope="module")
def left_alone(config, tmp_path_factory):
    """A run on two ranks that nobody disturbs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    process = start(config, run, "--processes", str(RANKS))
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert f"{RANKS} ranks (replicate {RANKS} × gauss 1)" in output
    assert output.count("the report;") == 1, "every rank wrote one"
    return run


def test_a_run_on_two_ranks_has_a_heartbeat_of_each(left_alone):
    assert status(left_alone)["state"] == "complete"
    steps = steps_of_ranks(left_alone)
    assert len(steps) == RANKS
    assert steps[0] == steps[1]
    last = json.loads((left_alone / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ranks"] == RANKS
    for path in (left_alone / "ranks").iterdir():
        record = json.loads(path.read_text().splitlines()[-1])
        assert record.keys() >= {"step", "images_per_s", "wait_share", "collective_share", "memory_gib"}
        assert 0 < record["collective_share"] < 1
    latents = np.load(left_alone / "latents.npy")
    assert latents.shape == (240, 2)
    assert np.isfinite(latents).all()


@pytest.mark.parametrize("whom", ["the launcher", "one rank"])
def test_a_signal_stops_all_ranks_at_one_step_and_the_run_goes_on_to_the_same_end(config, left_alone, tmp_path, whom):
    run = tmp_path / "run"
    process = start(config, run, "--processes", str(RANKS))
    wait_for_steps(process, run)
    if whom == "the launcher":
        process.send_signal(signal.SIGTERM)
    else:
        ranks_of(process)[1].send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert re.search(r"stopped by SIG(TERM|USR2) and saved at step \d+ of stage", errors)
    assert "Traceback" not in errors
    assert errors.count("stopped by") == 1
    found, state = status(run), read_state(run)
    assert state is not None
    assert (found["state"], found["stage"], found["step"]) == ("stopped", state.stage, state.step)
    assert start(config, run, "--processes", str(RANKS)).wait(timeout=180) == 0
    for name in ("latents.npy", "parts.npy"):
        assert (run / name).read_bytes() == (left_alone / name).read_bytes()


def test_a_rank_that_is_killed_is_named_and_all_start_again_from_the_last_save(config, left_alone, tmp_path):
    run = tmp_path / "run"
    process = start(config, run, "--processes", str(RANKS))
    wait_for_steps(process, run, 3)
    ranks_of(process)[1].kill()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "rank 0: rank 1 is gone or stopped" in errors
    assert "rank 1 of 2 was ended by SIGKILL; starting all again (1 of 3)" in errors
    assert "Traceback" not in errors
    assert (run / "latents.npy").read_bytes() == (left_alone / "latents.npy").read_bytes()


def test_a_rank_that_hangs_is_named_within_the_stated_time(config, tmp_path):
    run = tmp_path / "run"
    process = start(config, run, "--processes", "3", "--restarts", "0", "--set", "parallel.timeout_s=5",
                    "--set", "stage1.batch=48", "--set", "stage2.batch=48")  # fmt: skip
    wait_for_steps(process, run)
    hung = ranks_of(process)[2]
    hung.suspend()
    since = time.monotonic()
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        if hung.is_running():
            hung.kill()
    assert process.returncode == 1
    assert "rank 2 is gone or stopped" in errors
    assert time.monotonic() - since < 5 + 5 + 15 + 10, "timeout, notice, grace of the launcher, and some"
    assert status(run)["state"] == "failed"
    assert "rank 2" in status(run)["message"]


def test_killed_again_and_again_it_ends_the_same_and_sees_every_particle_once(config, left_alone, tmp_path):
    """Each kill hits a random rank at a random moment; whatever is saved can be read."""
    run, moments = tmp_path / "run", random.Random(3)
    for _ in range(4):
        process = start(config, run, "--processes", str(RANKS), "--restarts", "0")
        time.sleep(moments.uniform(4, 9))
        alive = ranks_of(process)
        if alive:
            moments.choice(alive).kill()
        process.communicate(timeout=60)
        if (run / "latest").exists():
            assert read_state(run) is not None
        if process.returncode == 0:
            break
    assert start(config, run, "--processes", str(RANKS)).wait(timeout=180) == 0
    for name in ("latents.npy", "parts.npy"):
        assert (run / name).read_bytes() == (left_alone / name).read_bytes()
    counts = Counter(steps_of_ranks(run)[0])
    assert max(counts.values()) == 1, "a step was made twice and kept twice"


@pytest.mark.parametrize("shared", ["1", "0"], ids=["own stores", "torchrun's store"])
def test_under_torchrun_a_killed_rank_starts_again(config, left_alone, tmp_path, shared, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", shared)
    run = tmp_path / "run"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    process = start(config, run, launcher=torchrun)
    wait_for_steps(process, run, 3)
    ranks_of(process)[-1].kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert (run / "latents.npy").read_bytes() == (left_alone / "latents.npy").read_bytes()


def test_a_mistake_in_the_settings_is_one_line_and_no_restart(config, tmp_path):
    process = start(config, tmp_path / "run", "--processes", str(RANKS), "--set", "parallel.gauss=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "parallel.gauss = 3: does not divide the 2 rank(s)" in errors
    assert "Traceback" not in errors
    process = start(config, tmp_path / "run", "--processes", str(RANKS), "--set", "data.store='nowhere'")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("nowhere") == 1, "said by more than one rank"


def test_stopping_before_anything_began_is_a_stop():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    pid = os.getpid()
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({pid}, {signal.SIGTERM.value})"])
    assert launch(command, RANKS, restarts=3) == 75
