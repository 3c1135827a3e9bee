"""Queue work and return at once: submitit writes the batch file, keeps the log and queues the job again.

`submit`, of `spire-dist submit` and notebooks, queues a training run: one node, one task; `slurm/train.sh` is the same job by
hand. `queue` and what it needs serve `prep_jobs.py` as well. submitit is imported inside the functions, because the core
works without it.
"""

import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, get_args

from spire_dist.config import load_config
from spire_dist.errors import ConfigError, RunError, Stopped

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

Cluster = Literal["slurm", "local"]

SIGNAL_DELAY_S = 180
"""Notice before the time limit: Slurm may be 60 s early and looks every 30 s; what is left must hold one checkpoint."""

MAX_TIME_LIMITS = 100
"""Time limits one job may meet. submitit allows three, too few for a long run; here each one ends in a checkpoint."""

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""USR2: submitit's notice of a time limit. TERM: preemption. INT: Ctrl-C or the end of a local job."""


def submit(
    config: Path,
    run: Path,
    *,
    cluster: Cluster = "slurm",
    partition: str | None = None,
    time_min: int = 24 * 60,
    gpus: int = 1,
    cpus: int = 8,
    memory_gib: float = 32.0,
    sbatch: Sequence[str] = (),
) -> str:
    """Queue `spire-dist train CONFIG --run RUN` and return the job id. The log comes to `RUN/jobs/`.

    `sbatch` are further options, "key=value" or "flag", that win over the others ("account=lab", "exclusive"); where a
    site wants `gres=gpu:1`, give `gpus=0` beside it. `cluster="local"` runs the job on this machine, for trying out.
    Raises ConfigError for a setting that cannot work and RunError where Slurm refuses; neither leaves a job behind.
    """
    load_config(config)  # a mistake is told now and not after hours in the queue
    command = [sys.executable, "-m", "spire_dist.cli", "train", str(config.resolve()), "--run", str(run.resolve())]
    parameters = job_parameters(
        name=f"spire-{run.resolve().name}",
        partition=partition,
        time_min=time_min,
        gpus=gpus,
        cpus=cpus,
        memory_gib=memory_gib,
        sbatch=sbatch,
    )
    return queue([Job(tuple(command))], run.resolve() / "jobs", cluster, parameters)


def job_parameters(
    *, name: str, partition: str | None, time_min: int, gpus: int, cpus: int, memory_gib: float, sbatch: Sequence[str]
) -> dict[str, Any]:
    """What a one-node job needs, under submitit's names."""
    for option, value in {"--time-min": time_min, "--cpus": cpus, "--memory-gib": memory_gib}.items():
        if value <= 0:
            raise ConfigError(f"{option} {value}: must be above 0")
    if gpus < 0:
        raise ConfigError(f"--gpus {gpus}: must be 0 or more")
    return {
        "name": name,
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": time_min,
        "gpus_per_node": gpus or None,  # clusters without GPUs refuse even a request for none
        "cpus_per_task": cpus,
        "mem_gb": memory_gib,
        "slurm_partition": partition,
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
        "slurm_additional_parameters": {"requeue": True} | dict(map(_sbatch_option, sbatch)),
    }


def _sbatch_option(text: str) -> tuple[str, str | bool]:
    """("cpus_per_task", "4") of "cpus-per-task=4", with submitit's underscores, so that it replaces ours."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not key or (equals and not value):
        raise ConfigError(f"--sbatch {text!r}: write key=value, for example account=lab, or a flag such as exclusive")
    return key.replace("-", "_"), value if equals else True


def queue(tasks: Sequence["Task"], folder: Path, cluster: Cluster, parameters: dict[str, Any], after: str = "") -> str:
    """Hand tasks to the queue, several as one array; keep logs and job files in `folder`, and return the job's id.

    They start when the job `after` has ended, well or not.
    """
    require(cluster, "--cluster")
    import submitit
    from submitit.core.utils import FailedJobError

    new_folders = [path for path in (folder.parent, folder) if not path.exists()]
    # The cluster is always named: left to itself submitit takes Slurm wherever its client is installed.
    executor = submitit.AutoExecutor(
        folder, cluster, slurm_max_num_timeout=MAX_TIME_LIMITS, local_max_num_timeout=MAX_TIME_LIMITS
    )
    executor.update_parameters(**parameters, **({"slurm_dependency": f"afterany:{after}"} if after else {}))
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        if new_folders:
            shutil.rmtree(new_folders[0])
        raise RunError(f"sbatch refused the job: {_reason(str(error))}") from error
    return jobs[0].job_id.split("_")[0]


def require(cluster: Cluster, option: str) -> None:
    """Raise ConfigError, naming the option that asked for it, where a queue is not known or not here."""
    if cluster not in get_args(Cluster):
        raise ConfigError(f"{option} {cluster}: not known; choose one of {', '.join(get_args(Cluster))}")
    if find_spec("submitit") is None:
        raise ConfigError(f"{option} {cluster}: submitit is not installed; pip install 'spire-dist[slurm]'")
    if cluster == "slurm" and (shutil.which("sbatch") is None or shutil.which("srun") is None):
        raise ConfigError(f"{option} slurm: no sbatch and srun here; call it on a login node, or with {option} local")


def _reason(text: str) -> str:
    """The line of an error message that says most: Slurm's first one names the wrong value."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "no reason given")


class Task(ABC):
    """What submitit pickles and calls in a job; called again, after a time limit or in another place, it goes on."""

    @abstractmethod
    def __call__(self) -> None:
        """Do the work, or what is left of it."""

    def checkpoint(self) -> "DelayedSubmission":
        """What is queued next: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Job(Task):
    """A command that saves and ends with 75 when it receives TERM."""

    command: tuple[str, ...]

    def __call__(self) -> None:
        """Run the command. 75 queues the job again; any other failure, a configuration error above all, does not."""
        code = run_passing_stops_on(self.command)
        if code == Stopped.exit_code and _still_wanted():
            # submitit's own handler: checkpoint(), requeue, leave. It runs now, after the command has saved, and not
            # inside the signal, where the process would be gone before the checkpoint is.
            signal.raise_signal(signal.SIGUSR2)
        if code != 0:
            raise RunError(f"{' '.join(self.command)}: ended with exit code {code}; its last lines above say why")


def run_passing_stops_on(command: Sequence[str]) -> int:
    """Exit code of `command`; a stop signal that arrives here meanwhile reaches it as TERM."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # Slurm signals every process of the step, and USR2 kills one that is still starting; an ignored signal stays so
    # in the child until it asks for it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    child = subprocess.Popen(command)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.terminate()

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    try:
        return child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _still_wanted() -> bool:
    """False once Slurm is ending the job for good (scancel): to requeue it would bring a cancelled job back."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return True
    squeue = ["squeue", "--noheader", "--format=%T", "--jobs", os.environ["SLURM_JOB_ID"]]
    return subprocess.run(squeue, capture_output=True, text=True, check=False).stdout.strip() == "RUNNING"
