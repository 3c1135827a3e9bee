"""Prep on many machines: the shards of a begun store made by a Ray cluster or by Slurm jobs, with the bytes of one machine.

Called by `spire-dist prep` (`--engine ray | slurm`; `--share`, for slurm/prep.sh) and from notebooks. A shard needs nothing but
the begun store, so the store and the stacks must lie where every node sees them, under the same path.
"""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from cluster.lives import still_ours
from cluster.ray_cluster import ray_cluster, require_ray, told_by_a_worker
from cluster.submit import Task, job_parameters, queue, require
from data_prep.convert import Engine, cannot_write, complete
from data_prep.processes import in_processes
from data_prep.shards import NOTES, is_noted, missing_shards, read_attributes, shards_of, write_shard
from spire_dist.errors import ConfigError, SpireError, Stopped, StoreError
from spire_dist.progress import progress
from spire_dist.schema import MANIFEST_NAME

RETRIES = 3
"""So often a shard is given to another worker when its own died with process or node."""
QUEUED_PER_CORE = 2
"""Shards a Ray cluster is given at once: one being made and one to follow."""
MEMORY_GIB = 2.0
"""Of a Slurm job, which makes one shard at a time: at most 256 MiB of images, as stored and once more compressed."""


def choose_engine(name: str, ray_address: str | None = None, cpus: int | None = None) -> Engine | None:
    """What `--engine` means to `prepare`: None for slurm, where `queue_shards` follows. Raises ConfigError for another."""
    if name == "slurm":
        require("slurm", "--engine")
        return None
    if name == "ray":
        require_ray(ray_address)
        return partial(ray_engine, address=ray_address, cpus=cpus)
    raise ConfigError(f"--engine {name}: not known; choose local, ray or slurm")


def ray_engine(store: Path, shards: list[int], *, address: str | None = None, cpus: int | None = None) -> Iterator[int]:
    """Make shards as tasks of one core each of a Ray cluster, yielding them as they end: an `Engine` of `data_prep.convert`.

    `address` as for `ray_cluster`; without one, a cluster of this machine is started with `cpus` cores. Killed workers and
    lost nodes cost no more than the shards they were making. Raises what `write_shard` raises, as one line, and StoreError
    where a node does not see the store or workers are killed again and again.
    """
    with ray_cluster(address, cpus):
        import ray
        from ray.exceptions import LocalRayletDiedError, RayError, RayTaskError

        make = ray.remote(num_cpus=1, max_retries=RETRIES)(_make_shard)
        waiting, running = iter(shards), []
        try:
            while True:
                room = QUEUED_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 0))) - len(running)
                running += [make.remote(store.absolute(), shard) for shard in islice(waiting, max(0, room))]
                if not running:
                    return
                [done], running = ray.wait(running)
                yield ray.get(done)
        except RayTaskError as error:
            raise told_by_a_worker(error) from None
        except (LocalRayletDiedError, OSError) as error:
            raise StoreError(
                f"{store}: Ray has died on {socket.gethostname()}, this command's own node; run the same command again"
            ) from error
        except RayError as error:
            raise StoreError(
                f"{store}: a Ray worker was lost {RETRIES + 1} times over one shard ({type(error).__name__}), perhaps for its "
                "memory; run the same command again"
            ) from error
        finally:
            for task in running:
                ray.cancel(task, force=True)


def _make_shard(store: Path, shard: int) -> int:
    """What a Ray worker does."""
    if not (store / "zarr.json").is_file():
        raise StoreError(
            f"{store}: not there on {socket.gethostname()}; the store and the stacks must lie where all nodes of the Ray "
            "cluster see them, under the same path"
        )
    return write_shard(store, shard)


def queue_shards(
    store: Path,
    *,
    tasks: int = 16,
    partition: str | None = None,
    time_min: int = 60,
    sbatch: Sequence[str] = (),
) -> list[str]:
    """Queue what a begun store still needs and return the ids of the jobs at once; none where it is finished.

    An array of up to `tasks` jobs of one core shares the missing shards; a last job makes what they could not, and the
    manifest. At a time limit each is queued again and goes on. While jobs for this store are queued, their ids are returned
    and nothing is added. `sbatch` as for `submit`; logs come to `STORE.jobs/`. Raises ConfigError and RunError as `submit`.
    """
    store = store.absolute()
    if tasks < 1:
        raise ConfigError(f"--tasks {tasks}: must be 1 or more")
    name = re.sub(r"[^\w.-]", "-", f"prep-{store.name}-") + hashlib.sha256(bytes(store)).hexdigest()[:8]
    parameters = job_parameters(
        name=name, partition=partition, time_min=time_min, gpus=0, cpus=1, memory_gib=MEMORY_GIB, sbatch=sbatch
    )
    if (store / MANIFEST_NAME).exists():
        return []
    if queued := _jobs_named(name):
        return queued
    folder = store.with_name(f"{store.name}.jobs")
    missing = missing_shards(store)
    shares = [Share(store, tuple(missing[task::tasks])) for task in range(min(tasks, len(missing)))]
    jobs = [queue(shares, folder, "slurm", parameters)] if shares else []
    return [*jobs, queue([Rest(store)], folder, "slurm", parameters, after=jobs[0] if jobs else "")]


def _jobs_named(name: str) -> list[str]:
    """Ids of the user's jobs of a name that wait or run, arrays as one."""
    squeue = ["squeue", "--noheader", "--me", f"--name={name}", "--format=%F"]
    found = subprocess.run(squeue, capture_output=True, text=True, check=False).stdout.split()
    return sorted(set(found), key=int)


@dataclass(frozen=True)
class Share(Task):
    """One of the array's jobs: some shards of a begun store, those that are not there yet."""

    store: Path
    shards: tuple[int, ...]

    def __call__(self) -> None:
        """Make them one after the other."""
        with _told_in_one_line():
            for shard in self.shards:
                write_shard(self.store, shard)


@dataclass(frozen=True)
class Rest(Task):
    """The last job: whatever is missing when the array has ended, and the manifest."""

    store: Path

    def __call__(self) -> None:
        """Complete the store."""
        with _told_in_one_line():
            complete(self.store, partial(in_processes, workers=1))


def read_share(text: str, engine: str = "local") -> tuple[int, int]:
    """(2, 16) of "2/16", the third of sixteen shares. Raises ConfigError for any other text, and where an engine shares out."""
    if engine != "local":
        raise ConfigError(f"--share {text}: not with --engine {engine}, which shares out the work itself")
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if number >= count:
        raise ConfigError(f"--share {text}: write K/N, the K-th of N shares from 0; in Slurm use sbatch --array=0-15")
    return number, count


def make_share(store: Path, number: int, count: int) -> int:
    """Make every `count`-th shard of a begun store, from `number` on; whoever then finds all made writes the manifest.

    Returns how many are still to be made by others. Raises Stopped where Ctrl-C, or `queued_again`, ends it.
    """
    every = shards_of(read_attributes(store))
    own = every[number::count]
    missing = [shard for shard in own if not is_noted(store, shard)]
    try:
        made = (write_shard(store, shard) for shard in missing)
        for _ in progress(made, "prep", total=len(own), unit="shard", done=len(own) - len(missing)):
            pass
    except OSError as error:
        raise cannot_write(store, error) from error
    except KeyboardInterrupt:
        raise Stopped(f"{store}: stopped with share {number}/{count} unfinished; the same command goes on") from None
    for folder in (store / NOTES, store / "images" / "c"):
        if folder.is_dir():
            list(folder.iterdir())  # NFS looks anew: of two that end together one sees the shards of both
    if left := len(missing_shards(store)):
        return left
    complete(store, partial(in_processes, workers=1))
    return 0


@contextmanager
def queued_again() -> Iterator[None]:
    """Inside the block USR2 and TERM stop the work as Ctrl-C does, and a Slurm job that was stopped is queued again.

    That is what a job gets before its time limit (`sbatch --signal`) and when another one takes its place. To be called in
    the main thread.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        yield
    except Stopped:
        job = os.environ.get("SLURM_JOB_ID")
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if job and shutil.which("scontrol") and still_ours(job):
            subprocess.run(["scontrol", "requeue", job], check=False)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """A user's mistake ends a job's log as it ends a command."""
    try:
        yield
    except SpireError as error:
        print(f"spire-dist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
