"""slurm/sweep.sh on a real Slurm of two nodes: Ray on both, time runs out, the job comes back and goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.sweep_files import STARTS, read_lines, read_reports
from spire_dist.config import dump_config, load_config
from tests.cluster.lab import Lab, wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "sweep.sh"
SPACE = """
base = "base.toml"
[sweep]
trials = 2
search = "random"
[space]
latent.weight = {choice = [0.1, 0.2]}
"""


def test_the_script_is_short_and_refuses_what_it_cannot_use():
    assert len(SCRIPT.read_text().splitlines()) <= 40
    assert os.access(SCRIPT, os.X_OK)
    result = subprocess.run(["bash", str(SCRIPT), "space.toml"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.split()[0]) == (2, "usage:")


@pytest.mark.slow
def test_a_sweep_on_two_nodes_whose_time_runs_out_comes_back_and_goes_on(
    slurm: Lab, tiny_settings, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    settings = [*tiny_settings, "stage1.epochs=60", "stage2.epochs=40"]
    (tmp_path / "base.toml").write_text(dump_config(load_config(overrides=settings)))
    (tmp_path / "space.toml").write_text(SPACE)
    out, log = tmp_path / "out", tmp_path / "job.log"
    options = ["--nodes=2", "--cpus-per-task=1", "--mem=4G", "--time=10", f"--output={log}", f"--chdir={tmp_path}"]
    job = slurm.sbatch(*options, SCRIPT, "space.toml", "out")

    def told() -> str:
        return log.read_text() if log.exists() else slurm.log()

    wait_until(lambda: len(list(out.glob("trials/*/metrics.jsonl"))) == 2, 240, told)
    assert not any(read_reports(run) for run in (out / "trials").iterdir())
    slurm.scancel("--signal=USR2", job)
    found = slurm.wait(job, "COMPLETED", "FAILED", restarts=1, timeout_s=400)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), told()
    assert "stopped by SIGUSR2; go on with" in told()
    hosts = [{start["host"] for start in read_lines(run / STARTS)} for run in sorted((out / "trials").iterdir())]
    assert set.union(*hosts) == {"n1", "n2"}
    for run in (out / "trials").iterdir():
        assert len(read_reports(run)) == 1
        assert "going on at stage" in (run / "train.log").read_text()
    assert (out / "best.toml").exists()
