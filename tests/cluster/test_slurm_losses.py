"""A training job whose nodes die or are cut off, on a real Slurm of three nodes with a network each."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster.lab import wait_until
from tests.cluster.training_job import (
    TAKEN_AWAY,
    has_ended_like,
    lives,
    log,
    node_of,
    queue_training,
    run_alone,
    saved,
    starts,
    training,
    wait_for_progress,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_settings) -> Path:
    return write_config(tmp_path_factory.mktemp("losses") / "config.toml", tiny_settings)


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """A run on two ranks that nobody disturbs."""
    return run_alone(config, config.with_name("alone"), processes=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_whose_node_dies_goes_on_elsewhere(walled_slurm, config, alone, tmp_path, rank):
    run, lab = tmp_path / "run", walled_slurm
    job = queue_training(lab, config, run)
    left = wait_for_progress(lab, job, run)
    name = node_of(training(lab, job)[rank])
    lab.kill_node(name)
    assert training(lab, job).keys() == {1 - rank}
    assert name not in nodes(lab.wait(job, "RUNNING", restarts=1))
    lab.start_node(name)
    has_ended_like(lab, job, run, alone, restarts=1)
    assert lab.history(job) == ["NODE_FAIL", "COMPLETED"]
    [went_on] = starts(run, job)
    assert went_on >= left
    lab.wait_for_nodes()


def nodes(shown: dict[str, str]) -> list[str]:
    """Names of a job's nodes."""
    command = ["scontrol", "show", "hostnames", shown["NodeList"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_node_that_is_cut_off_leaves_the_job_to_the_others(walled_slurm, config, alone, tmp_path):
    """The first rank's, which holds the run directory."""
    run, lab = tmp_path / "run", walled_slurm
    job = queue_training(lab, config, run)
    wait_for_progress(lab, job, run)
    orphan = training(lab, job)[0]
    name = node_of(orphan)
    lab.cut(name)
    assert name not in nodes(lab.wait(job, "RUNNING", restarts=1))
    assert lab.processes(name, word="cluster.entry"), "the old life lives on"
    has_ended_like(lab, job, run, alone, restarts=1)
    lab.mend(name)
    lab.wait_for_nodes()
    wait_until(lambda: not lab.processes(word="cluster.entry"))
    has_ended_like(lab, job, run, alone, restarts=1)  # still


def test_a_rank_that_wakes_on_a_cut_off_node_saves_nothing_once_the_job_runs_elsewhere(walled_slurm, config, tmp_path):
    """A rank alone needs nobody to go on, so it could write on into the run directory of the job's next life."""
    run, lab = tmp_path / "run", walled_slurm
    alone = run_alone(config, tmp_path / "alone", processes=1)
    job = queue_training(lab, config, run, "--nodes=1")
    wait_for_progress(lab, job, run)
    orphan = training(lab, job)[0]
    orphan.suspend()
    before, name = saved(run), node_of(orphan)
    lab.cut(name)
    assert name not in nodes(lab.wait(job, "RUNNING", restarts=1))
    wait_for_progress(lab, job, run, before)
    orphan.resume()
    wait_until(lambda: not orphan.is_running())
    assert "a newer life of this job" in log(run, job)
    wait_until(lambda: [life["then"] for life in lives(run) if life["restart"] == 0] == [TAKEN_AWAY])
    has_ended_like(lab, job, run, alone, restarts=1)
    lab.mend(name)
    lab.wait_for_nodes()
    has_ended_like(lab, job, run, alone, restarts=1)  # still
