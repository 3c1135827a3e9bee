"""Shards made by a Ray cluster of two nodes and by a real Slurm: the bytes of one machine, whatever is killed meanwhile."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mrcfile
import psutil
import pytest

from cluster.prep_jobs import choose_engine, queue_shards, ray_engine
from cluster.ray_cluster import ray_cluster
from data_prep import shards
from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, RunError, SourceError, StoreError

PER_SHARD = 64
TASK = "ray::_make_shard"
"""What Ray calls a worker that makes a shard."""


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connected(two_nodes: str) -> Iterator[None]:
    with ray_cluster(two_nodes):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "compact"])
def test_ray_makes_the_bytes_of_one_machine(tmp_path, write_particles, connected, dtype):
    source = write_particles(tmp_path / "in", count=500)
    options = {"images_per_shard": PER_SHARD, "dtype": dtype}
    expected = prepare(source, tmp_path / "local", **options)
    store = prepare(source, tmp_path / "ray", engine=ray_engine, **options)
    assert len(list((store / ".prep").iterdir())) == 8
    assert contents(store) == contents(expected)


@pytest.mark.slow
def test_a_ray_worker_killed_in_its_task_changes_nothing(tmp_path, write_particles, connected):
    source = write_particles(tmp_path / "in", count=1000, box=128, per_stack=400)
    expected = prepare(source, tmp_path / "local", box=80, images_per_shard=PER_SHARD)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed))
    killer.start()
    store = prepare(source, tmp_path / "ray", box=80, images_per_shard=PER_SHARD, engine=ray_engine)
    killer.join()
    assert len(killed) == 1
    assert contents(store) == contents(expected)


def kill_a_worker(store: Path, killed: list[int], timeout_s: float = 120.0) -> None:
    """SIGKILL for one that is making a shard, when some are made; its id goes to `killed`."""
    deadline = time.monotonic() + timeout_s
    while not killed and time.monotonic() < deadline:
        if len(list((store / ".prep").glob("*.json"))) < 2:
            continue
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] != [TASK]:
                    continue
                process.suspend()
                if process.cmdline()[:1] == [TASK]:  # still
                    process.kill()
                    killed.append(process.pid)
                    break
                process.resume()


@pytest.mark.slow
def test_a_ray_workers_refusal_is_the_one_line_of_one_machine(tmp_path, write_particles, connected, refusal):
    source = write_particles(tmp_path / "in")
    with mrcfile.open(source.parent / "stacks" / "part01.mrcs", "r+") as mrc:
        mrc.data[7] = 1.0
    told = [
        refusal(SourceError, ["part01.mrcs: image 8", "flat background"], call)
        for call in (
            lambda: prepare(source, tmp_path / "local"),
            lambda: prepare(source, tmp_path / "ray", engine=ray_engine),
        )
    ]
    assert told[0] == told[1]
    assert not (tmp_path / "ray" / "manifest.json").exists()


@pytest.mark.slow
def test_a_node_that_does_not_see_the_store_is_named(tmp_path, connected, refusal):
    words = [str(tmp_path / "elsewhere"), "not there on", "all nodes"]
    refusal(StoreError, words, lambda: list(ray_engine(tmp_path / "elsewhere", [0])))


def test_an_engine_that_is_not_known_is_refused_with_those_that_are(refusal):
    refusal(ConfigError, ["--engine dask", "local, ray or slurm"], lambda: choose_engine("dask"))


def test_a_ray_cluster_that_is_not_there_is_told_before_anything_is_written(refusal):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    refusal(ConfigError, ["Ray at 127.0.0.1:1"], lambda: choose_engine("ray", "127.0.0.1:1"))


# --- Slurm -----------------------------------------------------------------------------------------------------------


def squeue(*options: str) -> list[str]:
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True, check=True).stdout.split()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still {squeue('--format=%i/%T/%r')}"
        time.sleep(0.1)


@pytest.mark.slow
def test_slurm_makes_the_bytes_of_one_machine_and_the_command_does_not_wait(tmp_path, write_particles, slurm):
    source = write_particles(tmp_path / "in", count=500)
    expected = prepare(source, tmp_path / "local", images_per_shard=PER_SHARD)
    store = tmp_path / "slurm"
    command = [sys.executable, "-m", "spire_dist.cli", "prep", source, store, "--images-per-shard", str(PER_SHARD)]
    command += ["--engine", "slurm", "--tasks", "2", "--time-min", "10", "--sbatch", "mem=500"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    array, _ = told.split("queued: ")[1].split(",")[0].split()
    assert not (store / "manifest.json").exists()
    assert squeue("--format=%i %m", f"--jobs={array}", "--array")[1::2] == ["500M", "500M"]
    wait_until(lambda: squeue() == [])
    assert contents(store) == contents(expected)
    assert "ready; look" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_slurm_job_at_its_time_limit_goes_on_and_the_last_job_makes_what_a_killed_one_left_out(
    tmp_path, write_particles, slurm
):
    source = write_particles(tmp_path / "in", count=500)
    expected = prepare(source, tmp_path / "local", images_per_shard=PER_SHARD)
    store = prepare(source, tmp_path / "slurm", images_per_shard=PER_SHARD, only_begin=True)
    with unreadable(source.parent / "stacks"):
        array, last = jobs = queue_shards(store, tasks=2, time_min=20)
        subprocess.run(["scontrol", "hold", last], check=True)
        assert queue_shards(store, tasks=2, time_min=20) == jobs  # once is enough
        wait_until(lambda: working(store) == {"0", "1"})
        subprocess.run(["scancel", "--signal=USR2", f"{array}_0"], check=True)  # what comes before a time limit
        subprocess.run(["scancel", "--signal=KILL", "--full", f"{array}_1"], check=True)
        wait_until(lambda: working(store) == set())
    wait_until(lambda: squeue("--format=%A") == [last])
    assert shards.missing_shards(store) == [1, 3, 5, 7]
    subprocess.run(["scontrol", "release", last], check=True)
    wait_until(lambda: squeue() == [])
    assert contents(store) == contents(expected)


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Inside the block whoever opens a file of the folder waits."""
    files = list(folder.iterdir())
    away = folder.rename(folder.with_name("away"))
    folder.mkdir()
    for file in files:
        os.mkfifo(file)
    yield
    shutil.rmtree(folder)
    away.rename(folder)


def working(store: Path) -> set[str]:
    """Numbers of the array's jobs that are at work: ready to be told of a time limit."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = process.cmdline()
            if command[:1] == [sys.executable] and f"{store}.jobs" in command:
                status = Path(f"/proc/{process.pid}/status").read_text()
                caught = int(status.split("SigCgt:")[1].split()[0], 16)
                if caught >> (signal.SIGUSR2 - 1) & 1:
                    found.add(process.environ()["SLURM_ARRAY_TASK_ID"])
    return found


@pytest.mark.slow
def test_a_partition_that_slurm_does_not_have_is_refused_and_the_store_can_still_be_made(
    tmp_path, write_particles, slurm, refusal
):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store", only_begin=True)
    refusal(RunError, ["sbatch refused", "invalid partition", "nope"], lambda: queue_shards(store, partition="nope"))
    assert not (tmp_path / "store.jobs").exists()
    assert ParticleStore.open(prepare(source, store)).count == 150


def test_no_slurm_here_is_told_before_anything_is_written(tmp_path, monkeypatch, refusal):
    pytest.importorskip("submitit", reason="needs the extra [slurm]")
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal(ConfigError, ["--engine slurm: no sbatch", "--engine local"], lambda: choose_engine("slurm"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "compact"])
def test_a_shard_that_two_processes_make_at_once_is_whole(tmp_path, write_particles, monkeypatch, dtype):
    source, options = write_particles(tmp_path / "in"), {"images_per_shard": PER_SHARD, "dtype": dtype}
    expected = prepare(source, tmp_path / "once", **options)
    store = prepare(source, tmp_path / "twice", only_begin=True, **options)
    replacing = shards.replacing

    @contextlib.contextmanager
    def overtaken(path: Path, **how: bool) -> Iterator[Path]:
        with replacing(path, **how) as partial:
            yield partial
            code = "import sys, pathlib; from data_prep.shards import write_shard; write_shard(pathlib.Path(sys.argv[1]), 1)"
            subprocess.run([sys.executable, "-c", code, store], check=True)

    monkeypatch.setattr(shards, "replacing", overtaken)
    shards.write_shard(store, 1)
    monkeypatch.undo()
    assert contents(prepare(source, store, **options)) == contents(expected)
