"""Submission without Slurm: real jobs through submitit's local executor, the batch file through stand-in commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from cluster.submit import Job, job_parameters, queue, submit
from spire_dist.errors import ConfigError, RunError

pytest.importorskip("submitit", reason="needs the extra [slurm]")

JOB = """
[job]
nodes = 3
tasks_per_node = 2
memory_gib = 48
partition = "gpu"
sbatch = { account = "lab", contiguous = false }
setup = ["module load cuda"]
"""

SMALL = {"time_min": 10, "gpus": 0, "cpus": 1, "memory_gib": 1.0, "partition": None}


def run_locally(script: str, folder: Path, timeout_s: float = 60.0) -> str:
    """Queue a Python script on this machine, wait for the end of the job, and return its log."""
    command = (sys.executable, "-c", textwrap.dedent(script), str(folder))
    job = queue([Job(command)], folder / "jobs", "local", job_parameters(name="test", sbatch=(), **SMALL))
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(job)).wait(timeout_s)  # a local job's id is that of the process that starts it
    return "".join(path.read_text() for path in sorted((folder / "jobs").glob("*_log.*")))


def test_local_job_runs_the_command_and_keeps_its_output(tmp_path: Path):
    log = run_locally("print('six times seven is', 6 * 7)", tmp_path)
    assert "six times seven is 42" in log
    assert "Job completed successfully" in log


def test_exit_75_queues_the_job_again_until_it_is_done(tmp_path: Path):
    script = """
        import pathlib, sys
        lives = pathlib.Path(sys.argv[1], "lives")
        lives.open("a").write("x")
        sys.exit(75 if len(lives.read_text()) < 3 else 0)
    """
    log = run_locally(script, tmp_path)
    assert (tmp_path / "lives").read_text() == "xxx"
    assert "Job completed successfully" in log


@pytest.mark.parametrize("code", [1, 2])
def test_errors_end_the_job_and_are_not_tried_again(tmp_path: Path, code: int):
    script = f"""
        import pathlib, sys
        pathlib.Path(sys.argv[1], "lives").open("a").write("x")
        print("config.toml: data.box = -1: must be above 0", file=sys.stderr)
        sys.exit({code})
    """
    log = run_locally(script, tmp_path)
    assert (tmp_path / "lives").read_text() == "x"
    assert "config.toml: data.box = -1" in log
    assert f"ended with exit code {code}" in log


@pytest.mark.parametrize("notice", [signal.SIGUSR2, signal.SIGTERM])
def test_notice_reaches_the_command_as_term_and_the_job_goes_on_after_saving(tmp_path: Path, notice: signal.Signals):
    script = f"""
        import os, pathlib, signal, sys, time
        saved = pathlib.Path(sys.argv[1], "saved")
        if saved.exists():
            pathlib.Path(sys.argv[1], "finished").touch()
            sys.exit(0)

        def save(number, frame):
            saved.write_text(signal.Signals(number).name)
            sys.exit(75)

        signal.signal(signal.SIGTERM, save)
        os.kill(os.getpid(), signal.SIGUSR2)       # Slurm signals all processes: this one must survive it
        os.kill(os.getppid(), {int(notice)})
        time.sleep(30)
    """
    run_locally(script, tmp_path)
    assert (tmp_path / "saved").read_text() == "SIGTERM"
    assert (tmp_path / "finished").exists()


def test_job_outlives_the_process_that_submitted_it(tmp_path: Path):
    script = f"""
        import sys
        from pathlib import Path
        from cluster.submit import Job, job_parameters, queue
        folder = Path({str(tmp_path)!r})
        work = "import time, pathlib; time.sleep(1); pathlib.Path({str(tmp_path / "done")!r}).touch()"
        print(queue([Job((sys.executable, "-c", work))], folder / "jobs", "local",
                    job_parameters(name="test", sbatch=(), **{SMALL!r})))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert not (tmp_path / "done").exists(), "submitting waited for the job"
    deadline = time.monotonic() + 30
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- Slurm, with stand-ins for its commands


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, first in PATH, whose sbatch keeps the batch file and answers like Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder / "sbatch", f'cp "$1" {tmp_path}/batch.sh; echo "Submitted batch job 4711"')
    write_command(folder / "srun", "exit 1")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('[data]\nstore = "particles.zarr"\n')
    return path


def test_batch_file_asks_slurm_for_what_the_configuration_says(tmp_path: Path, slurm_commands: Path, config: Path):
    config.write_text(config.read_text() + JOB)
    job = submit(config, tmp_path / "run", settings=["job.time_min=90"], sbatch=["--exclusive", "cpus-per-task=12"])
    assert job == "4711"
    noted = json.loads((tmp_path / "run" / "jobs" / "job.json").read_text())
    assert (noted["id"], noted["cluster"]) == ("4711", "slurm")
    lines = (tmp_path / "batch.sh").read_text().splitlines()
    for wanted in (
        "#SBATCH --job-name=spire-run",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=90",
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=48GB",
        "#SBATCH --signal=USR2@180",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --account=lab",
        "#SBATCH --exclusive",
        "module load cuda",
        f"#SBATCH --output={tmp_path}/run/jobs/%j_0_log.out",
    ):
        assert lines.count(wanted) == 1, f"{wanted} in\n" + "\n".join(lines)
    assert sum("--cpus-per-task" in line for line in lines) == 1
    assert not any("contiguous" in line for line in lines)
    command = lines[lines.index("# command") + 2]
    assert command.startswith("srun --unbuffered")
    assert "--kill-on-bad-exit=1" in command
    assert f"{sys.executable} -u -m submitit.core._submit" in command


def test_no_gpus_asks_for_none(tmp_path: Path, slurm_commands: Path, config: Path):
    submit(config, tmp_path / "run", settings=["job.gpus_per_task=0"], sbatch=["gres=gpu:1"])
    text = (tmp_path / "batch.sh").read_text()
    assert "--gpus-per-node" not in text
    assert "#SBATCH --gres=gpu:1" in text


def test_refusal_by_slurm_is_one_line_and_leaves_nothing(tmp_path: Path, slurm_commands: Path, config: Path):
    write_command(slurm_commands / "sbatch", 'echo "sbatch: error: invalid partition specified: nope" >&2; exit 1')
    with pytest.raises(RunError) as caught:
        submit(config, tmp_path / "run", settings=["job.partition=nope"])
    assert str(caught.value) == "sbatch refused the job: sbatch: error: invalid partition specified: nope"
    assert not (tmp_path / "run").exists()


def test_refusal_keeps_an_existing_run(tmp_path: Path, slurm_commands: Path, config: Path):
    write_command(slurm_commands / "sbatch", "exit 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError):
        submit(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_no_slurm_here_names_the_way_out(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--cluster local"):
        submit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_min": 0}, "--time-min 0: must be above 0"),
        ({"sbatch": ["account="]}, "--sbatch 'account='"),
        ({"sbatch": ["=lab"]}, "--sbatch '=lab'"),
    ],
)
def test_wrong_request_names_the_option(change: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        job_parameters(**({"name": "test", "sbatch": ()} | SMALL | change))
    assert str(caught.value).startswith(message)


def test_unknown_cluster_names_the_known_ones(tmp_path: Path, config: Path):
    with pytest.raises(ConfigError, match="--cluster pbs: not known; choose one of slurm, local"):
        submit(config, tmp_path / "run", cluster="pbs")  # type: ignore[arg-type]


def test_mistake_in_the_config_is_told_before_the_queue(tmp_path: Path, slurm_commands: Path, config: Path):
    config.write_text("[data]\nstorre = 1\n")
    with pytest.raises(ConfigError, match="storre"):
        submit(config, tmp_path / "run")
    assert not (tmp_path / "batch.sh").exists()


def test_cancelled_job_is_not_brought_back(slurm_commands: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    requeued: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: requeued.append(number))
    try:
        for state, expected in (("RUNNING", [signal.SIGUSR2]), ("COMPLETING", []), ("", [])):
            requeued.clear()
            write_command(slurm_commands / "squeue", f"echo {state}")
            with pytest.raises(RunError, match="exit code 75"):
                Job(("bash", "-c", "exit 75"))()
            assert requeued == expected, state
    finally:
        signal.signal(signal.SIGUSR2, previous)
