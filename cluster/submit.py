"""Queue work and return at once: submitit writes the batch file, keeps the log and queues the job again.

`submit`, of `spire-dist submit` and notebooks, queues a training run, a task for each rank; `slurm/train.sh` is the same job
by hand, and both end in `entry.py`. `queue` and what it needs serve `prep_jobs.py` as well. submitit is imported inside the
functions, because the core works without it.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cluster.entry import Stops, run_rank
from spire_dist.config import load_config
from spire_dist.errors import ConfigError, RunError, Stopped
from spire_dist.files import write_json

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

Cluster = Literal["slurm", "local"]

SIGNAL_DELAY_S = 180
"""Notice before the time limit: Slurm may be 60 s early and looks every 30 s; what is left must hold one checkpoint."""

MAX_TIME_LIMITS = 100
"""Time limits one job may meet. submitit allows three, too few for a long run; here each one ends in a checkpoint."""


def submit(
    config: Path, run: Path, *, cluster: Cluster = "slurm", settings: Sequence[str] = (), sbatch: Sequence[str] = ()
) -> str:
    """Queue `spire-dist train CONFIG --run RUN` and return the job id at once. Logs come to `RUN/jobs/`, one for each rank.

    What Slurm is asked for stands in the configuration's [job]. `settings` are "section.key=value", as for `train`. `sbatch`
    are further options, "key=value" or "flag", that win over the others ("account=lab", "exclusive"). `cluster="local"` runs
    the ranks of one node on this machine, for trying out.
    Raises ConfigError for a setting that cannot work and RunError where Slurm refuses; neither leaves a job behind.
    """
    job = load_config(config, overrides=list(settings)).job  # a mistake is told now and not after hours in the queue
    run = run.resolve()
    options = tuple(word for setting in settings for word in ("--set", setting))
    parameters = job_parameters(
        name=f"spire-{run.name}",
        nodes=job.nodes,
        tasks_per_node=job.tasks_per_node,
        partition=job.partition,
        time_min=job.time_min,
        gpus=job.tasks_per_node * job.gpus_per_task,
        cpus=job.cpus_per_task,
        memory_gib=job.memory_gib,
        setup=job.setup,
        sbatch=[*(f"{key}={value}" if value is not True else key for key, value in job.sbatch.items() if value is not False),
                *sbatch],
    )  # fmt: skip
    if cluster == "local":
        train = [sys.executable, "-m", "spire_dist.cli", "train", str(config.resolve()), "--run", str(run), *options]
        task = Job((*train, "--processes", str(job.tasks_per_node)))
        parameters |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": None}
    else:
        task = Rank(config.resolve(), run, options)
    number = queue([task], run / "jobs", cluster, parameters)
    write_json(run / "jobs" / "job.json", {"id": number, "cluster": cluster, "time": time.time()})
    return number


def job_parameters(
    *,
    name: str,
    partition: str | None,
    time_min: int,
    gpus: int,
    cpus: int,
    memory_gib: float,
    sbatch: Sequence[str],
    nodes: int = 1,
    tasks_per_node: int = 1,
    setup: Sequence[str] = (),
) -> dict[str, Any]:
    """What a job needs, under submitit's names: `gpus` and `memory_gib` of each node, `cpus` of each task."""
    if time_min <= 0:
        raise ConfigError(f"--time-min {time_min}: must be above 0")
    return {
        "name": name,
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "timeout_min": time_min,
        "gpus_per_node": gpus or None,  # clusters without GPUs refuse even a request for none
        "cpus_per_task": cpus,
        "mem_gb": memory_gib,
        "stderr_to_stdout": True,
        "slurm_partition": partition,
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
        "slurm_setup": list(setup) or None,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a lost rank ends the step, and does not leave the others waiting
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
        with Stops() as stops:
            code = stops.run(self.command)
        if code == Stopped.exit_code and _still_wanted():
            # submitit's own handler: checkpoint(), requeue, leave. It runs now, after the command has saved, and not
            # inside the signal, where the process would be gone before the checkpoint is.
            signal.raise_signal(signal.SIGUSR2)
        if code != 0:
            raise RunError(f"{' '.join(self.command)}: ended with exit code {code}; its last lines above say why")


@dataclass(frozen=True)
class Rank(Task):
    """One task of a training job on Slurm. What becomes of the job when it ends, `cluster.entry` sees to, not submitit."""

    config: Path
    run: Path
    options: tuple[str, ...]

    def __call__(self) -> None:
        """Train, and leave with an exit code that tells Slurm what happened."""
        sys.exit(run_rank(self.config, self.run, self.options))


def _still_wanted() -> bool:
    """False once Slurm is ending the job for good (scancel): to requeue it would bring a cancelled job back."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return True
    squeue = ["squeue", "--noheader", "--format=%T", "--jobs", os.environ["SLURM_JOB_ID"]]
    return subprocess.run(squeue, capture_output=True, text=True, check=False).stdout.strip() == "RUNNING"
