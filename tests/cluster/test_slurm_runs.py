"""The life of a training job on a real Slurm of two nodes: started, interrupted in every way, queued again, given up."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.status import read_states
from tests.cluster.lab import slurm_lab, wait_until
from tests.cluster.training_job import (
    TAKEN_AWAY,
    has_ended_like,
    lives,
    log,
    queue_training,
    run_alone,
    saved,
    starts,
    status,
    training,
    wait_for_progress,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_settings) -> Path:
    return write_config(tmp_path_factory.mktemp("runs") / "config.toml", tiny_settings)


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """A run on two ranks that nobody disturbs."""
    return run_alone(config, config.with_name("alone"), processes=2)


def state(run: Path) -> str:
    """What `spire-dist status` says."""
    return read_states([run])[0].state


def test_two_nodes_of_two_tasks_make_what_four_ranks_of_one_machine_make(slurm, config, tmp_path):
    short = ("--set", "stage1.epochs=8", "--set", "stage2.epochs=4")
    job = queue_training(slurm, config, tmp_path / "run", tasks=2, train=short)
    expected = run_alone(config, tmp_path / "alone", processes=4, train=short)
    has_ended_like(slurm, job, tmp_path / "run", expected, restarts=0)
    [started] = lives(tmp_path / "run", "started")
    assert (started["nodes"], started["ranks"]) == ("n[1-2]", 4)


def test_a_submitted_job_is_queued_then_trains_and_goes_on_after_a_notice_a_requeue_and_a_kill(
    slurm, config, alone, tmp_path
):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "spire_dist.cli", "submit", config, "--run", run, "--sbatch", "hold"]
    command += [f"--set=job.{it}" for it in ("nodes=2", "cpus_per_task=1", "memory_gib=8", "gpus_per_task=0")]
    job = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert slurm.show(job)["NumNodes"].startswith("2")
    assert state(run) == "queued"
    slurm.output("scontrol", "release", job)

    wait_for_progress(slurm, job, run)
    assert state(run) == "training"
    slurm.scancel("--signal=USR2", job)
    wait_until(lambda: status(run)["state"] == "stopped")
    left = [saved(run)]
    slurm.wait(job, "RUNNING", restarts=1)
    assert (lives(run)[0]["code"], lives(run)[0]["then"]) == (75, "requeued")

    wait_for_progress(slurm, job, run, left[0])
    slurm.output("scontrol", "requeue", job)
    wait_until(lambda: status(run)["state"] == "stopped")
    left.append(saved(run))
    slurm.wait(job, "RUNNING", restarts=2)

    wait_for_progress(slurm, job, run, left[1])
    training(slurm, job)[1].kill()
    slurm.wait(job, "RUNNING", restarts=3)
    assert "rank 1 was ended by SIGKILL" in lives(run)[-1]["why"]
    has_ended_like(slurm, job, run, alone, restarts=3)
    assert starts(run, job)[:2] == left
    assert starts(run, job)[2] > left[1]
    assert state(run) == "complete"
    assert [life["restart"] for life in lives(run) if life["then"] == "requeued"] == [0, 2], "1 was by hand"


def test_a_job_that_gives_way_to_a_higher_one_saves_within_the_grace_and_comes_back(slurm, config, alone, tmp_path):
    run = tmp_path / "run"
    job = queue_training(slurm, config, run)
    wait_for_progress(slurm, job, run)
    higher = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    wait_until(lambda: status(run)["state"] == "stopped")
    left = saved(run)
    slurm.wait(higher, "COMPLETED")
    has_ended_like(slurm, job, run, alone, restarts=1)
    assert starts(run, job) == [left]


def test_a_job_at_its_time_limit_saves_and_goes_on(slurm, config, alone, tmp_path):
    """Slurm looks every 30 s, so steps have to be slow: the ranks stand still until its notice comes."""
    run = tmp_path / "run"
    job = queue_training(slurm, config, run, "--time=1", "--signal=USR2@5", train=("--set", "parallel.timeout_s=300"))
    wait_for_progress(slurm, job, run)
    ranks = training(slurm, job).values()
    for rank in ranks:
        rank.suspend()
    wait_until(lambda: all(rank.status() == "stopped" for rank in ranks))  # it takes a moment
    wait_until(lambda: any(rank.status() != "stopped" or noticed(rank.pid) for rank in ranks), 70)
    for rank in ranks:
        rank.resume()
    wait_until(lambda: status(run)["state"] == "stopped", told=lambda: f"{lives(run)}\n{log(run, job)}\n{slurm.log()}")
    left = saved(run)
    slurm.wait(job, "RUNNING", restarts=1)
    slurm.output("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a busy machine needs more than this minute
    assert slurm.show(job)["TimeLimit"] == "00:30:00"
    has_ended_like(slurm, job, run, alone, restarts=1)
    assert starts(run, job) == [left]
    assert lives(run)[0]["code"] == 75


def noticed(pid: int) -> bool:
    """Whether a signal to stop waits for a process that stands still."""
    pending = int(Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1)


def test_a_mistake_in_the_settings_ends_the_job_with_2_and_it_is_not_queued_again(slurm, config, tmp_path):
    run = tmp_path / "run"
    job = queue_training(slurm, config, run, train=("--set", "parallel.gauss=3"))
    shown = slurm.wait(job, "FAILED", "COMPLETED")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")
    assert "parallel.gauss = 3: does not divide the 2 rank(s)" in log(run, job)
    assert "Traceback" not in log(run, job)
    assert [life["then"] for life in lives(run)] == ["not queued again"]


def test_a_job_comes_back_only_as_often_as_the_settings_allow(slurm, config, tmp_path):
    run, left = tmp_path / "run", (0, 0)
    job = queue_training(slurm, config, run, "--nodes=1", train=("--set", "job.requeues=1"))
    for life in (0, 1):
        slurm.wait(job, "RUNNING", restarts=life)
        left = wait_for_progress(slurm, job, run, left)
        training(slurm, job)[0].kill()
    shown = slurm.wait(job, "FAILED", "COMPLETED", restarts=1)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "1:0", "1")
    once, twice = (life["then"] for life in lives(run))
    assert once == "requeued"
    assert twice == "not queued again: it was 1 times, job.requeues = 1"
    assert f"To go on: spire-dist submit {config} --run {run}" in log(run, job)


def test_a_cancelled_job_saves_and_stays_away(slurm, config, tmp_path):
    run = tmp_path / "run"
    job = queue_training(slurm, config, run)
    wait_for_progress(slurm, job, run)
    slurm.scancel(job)
    wait_until(lambda: not slurm.processes(word=str(run)))
    assert status(run)["state"] == "stopped"
    assert slurm.wait(job, "CANCELLED", "PENDING", "FAILED")["JobState"] == "CANCELLED"
    assert [life["then"] for life in lives(run)] == [TAKEN_AWAY]


def test_where_ranks_cannot_ask_slurm_the_log_says_how_to_go_on(slurm, config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", without_scontrol(tmp_path / "bin"))
        job = queue_training(slurm, config, run, "--nodes=1")
    wait_for_progress(slurm, job, run)
    slurm.scancel("--signal=USR2", job)
    shown = slurm.wait(job, "FAILED", "COMPLETED")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "75:0", "0")
    assert f"run: spire-dist submit {config} --run {run}" in log(run, job)
    assert status(run)["state"] == "stopped"


def test_where_a_site_requeues_exit_code_75_a_job_comes_back_once_for_each_stop(
    slurm_installed, config, tmp_path, monkeypatch
):
    runs = {"asked for": tmp_path / "asked", "not asked for": tmp_path / "not"}
    with slurm_lab(2, more="RequeueExit=75") as lab:
        jobs = {"asked for": queue_training(lab, config, runs["asked for"], "--nodes=1")}
        with monkeypatch.context() as patch:
            patch.setenv("PATH", without_scontrol(tmp_path / "bin"))
            jobs["not asked for"] = queue_training(lab, config, runs["not asked for"], "--nodes=1")
        left = {}
        for how, job in jobs.items():
            wait_for_progress(lab, job, runs[how])
            lab.scancel("--signal=USR2", job)
            wait_until(lambda run=runs[how]: status(run)["state"] == "stopped")
            left[how] = saved(runs[how])
        for how, job in jobs.items():
            lab.wait(job, "RUNNING", restarts=1)
            wait_for_progress(lab, job, runs[how], left[how])
            assert starts(runs[how], job) == [left[how]]
            assert lab.show(job)["Restarts"] == "1"


def without_scontrol(folder: Path) -> str:
    """A PATH of the commands that a job needs, and no other."""
    folder.mkdir()
    for name in ("bash", "env", "mkdir", "sbatch", "srun"):
        (folder / name).symlink_to(shutil.which(name) or "")
    (folder / "python").write_text(f'#!{folder}/bash\nexec {sys.executable} "$@"\n')  # a link would lose its packages
    (folder / "python").chmod(0o755)
    return os.fspath(folder)
