"""A tiny training job on the lab's Slurm, and what can be told of it from outside.

Every step is logged, so that a run that was interrupted can be compared with one that was not step by step: a batch of other
particles has another loss.
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from spire_dist.config import dump_config, load_config
from tests.cluster.lab import Lab, wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sh"
LONGER = ["stage1.epochs=25", "stage2.epochs=6", "output.save_seconds=0.3", "output.log_seconds=0.001",
          "output.report=false", "parallel.timeout_s=30"]  # fmt: skip
"""So long that each life of a job can be met at work."""

TAKEN_AWAY = "Slurm has ended or requeued the job itself"
"""What a life of a job leaves in `jobs/lives.jsonl` where there was nothing left for it to decide."""

Reached = tuple[int, int]
"""(stage, step)."""


def write_config(path: Path, settings: list[str]) -> Path:
    """The configuration of such a run."""
    path.write_text(dump_config(load_config(overrides=[*settings, *LONGER])))
    return path


def queue_training(
    lab: Lab, config: Path, run: Path, *options: str, tasks: int = 1, train: tuple[str, ...] = ()
) -> str:
    """`sbatch slurm/train.sh CONFIG RUN` for two nodes with so many tasks each; returns the job's id."""
    shape = ["--nodes=2", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1", "--mem=8G"]
    return lab.sbatch(*shape, f"--output={run}.log", *options, SCRIPT, config, run, *train)


def run_alone(config: Path, run: Path, processes: int, train: tuple[str, ...] = ()) -> Path:
    """The same run without Slurm."""
    command = [sys.executable, "-m", "spire_dist.cli", "train", config, "--run", run, "--processes", str(processes)]
    result = subprocess.run([*command, *train], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return run


def status(run: Path) -> dict[str, Any]:
    """STATUS.json, empty before there is one."""
    path = run / "STATUS.json"
    return json.loads(path.read_text()) if path.exists() else {}


def saved(run: Path) -> Reached:
    """The newest save."""
    return status(run).get("stage", 0), status(run).get("step", 0)


def losses(run: Path) -> dict[Reached, float]:
    """The loss of every step; fails where a step is there twice."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    found = {(record["stage"], record["step"]): record["loss"] for record in records}
    assert len(found) == len(records), "a step was made twice and kept twice"
    return found


def reached(run: Path) -> Reached:
    """The last step that was made."""
    return max(losses(run), default=(0, 0))


def wait_for_progress(lab: Lab, job: str, run: Path, beyond: Reached = (0, 0)) -> Reached:
    """Until steps have been saved and others made since; returns the save that was there before this life's own."""
    end = ("FAILED", "COMPLETED", "CANCELLED", "NODE_FAIL")
    wait_until(
        lambda: lab.state(job) in end or (saved(run) > max(beyond, (1, 0)) and reached(run) > saved(run)),
        120, lambda: f"{status(run)} {lives(run)}\n{log(run, job)}",
    )  # fmt: skip
    assert lab.state(job) == "RUNNING", log(run, job)
    return saved(run)


def starts(run: Path, job: str) -> list[Reached]:
    """Where each life but the first went on, by the log of the first rank."""
    found = re.findall(r"going on at stage (\d), step (\d+)", (run / "jobs" / f"{job}_0_log.out").read_text())
    return [(int(stage), int(step)) for stage, step in found]


def lives(run: Path, event: str = "ended") -> list[dict[str, Any]]:
    """What `jobs/lives.jsonl` tells of lives that have started, or ended."""
    path = run / "jobs" / "lives.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in records if record["event"] == event]


def log(run: Path, job: str) -> str:
    """What all ranks have said, but for the lines of single steps."""
    paths = [*sorted((run / "jobs").glob(f"{job}_*_log.out")), run.with_name(f"{run.name}.log")]
    lines = [(path.name, path.read_text().splitlines()) for path in paths if path.exists()]
    return "\n".join(f"{name}: {line}" for name, said in lines for line in said if not line.startswith("stage "))


def training(lab: Lab, job: str) -> dict[int, psutil.Process]:
    """The training process of each rank of a job."""
    found = {}
    for process in lab.processes(word="train"):
        with contextlib.suppress(psutil.Error):  # it may have ended by now
            environment, parent = process.environ(), process.parent()
            reads_for_another = parent is not None and "train" in parent.cmdline()
            if environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment and not reads_for_another:
                found[int(environment["SLURM_PROCID"])] = process
    return found


def node_of(rank: psutil.Process) -> str:
    """The node that a rank runs on."""
    return rank.environ()["SLURMD_NODENAME"]


def has_ended_like(lab: Lab, job: str, run: Path, alone: Path, restarts: int) -> None:
    """The job is done, was started again so often, and made what the run that was left alone made, step by step."""
    shown = lab.wait(job, "COMPLETED", "FAILED", "CANCELLED", restarts=restarts, timeout_s=300)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log(run, job)
    assert int(shown["Restarts"]) == restarts, f"{lives(run)}\n{log(run, job)}"
    assert status(run)["state"] == "complete"
    assert [life["then"] for life in lives(run) if life["restart"] == restarts] == ["done"]
    assert losses(run) == losses(alone)
    for name in ("latents.npy", "parts.npy"):
        assert (run / name).read_bytes() == (alone / name).read_bytes()
