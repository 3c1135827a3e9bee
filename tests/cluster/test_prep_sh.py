"""slurm/prep.sh: the bytes of one machine from an array of jobs on a real Slurm, one of them stopped, one killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cluster.prep_jobs import make_share, queued_again, read_share
from data_prep import convert
from data_prep.convert import prepare
from data_prep.shards import is_noted, missing_shards
from spire_dist.errors import ConfigError, Stopped
from tests.cluster.lab import Lab, wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "prep.sh"
BOX, PER_SHARD, SHARDS = 80, 64, 16


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the script


def run_script(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code of prep.sh outside Slurm, and how it called srun, one argument per `|`."""
    srun, call = folder / "srun", folder / "call"
    srun.write_text(f'#!/bin/bash\n(IFS="|"; echo -n "$*" > "{call}")\nexit 75\n')
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | variables
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, check=False)
    return result.returncode, call.read_text() if call.exists() else ""


def test_the_script_hands_on_its_arguments_its_share_and_the_exit_code(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 40
    assert os.access(SCRIPT, os.X_OK)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "16"}
    called = "--kill-on-bad-exit=1|spire-dist|prep|my particles.star|store|--box|128|--share="
    words = ("my particles.star", "store", "--box", "128")
    assert run_script(tmp_path, *words, **array) == (75, f"{called}4/16")
    assert run_script(tmp_path, *words) == (75, f"{called}0/1")


def test_the_script_without_a_store_runs_nothing(tmp_path):
    assert run_script(tmp_path, "particles.star") == (2, "")


# ---- shares


@pytest.mark.parametrize("text", ["2", "2/2", "0/0", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(text, refusal):
    refusal(ConfigError, [f"--share {text}", "K/N"], lambda: read_share(text))


def test_a_share_of_what_an_engine_shares_out_is_refused_before_anything_is_written(tmp_path):
    command = [sys.executable, "-m", "spire_dist.cli", "prep", "in.star", tmp_path / "store", "--share", "0/2"]
    result = subprocess.run([*command, "--engine", "slurm"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert not (tmp_path / "store").exists()


def test_shares_in_any_order_make_a_store_and_the_last_one_completes_it(tmp_path, write_particles):
    source = write_particles(tmp_path / "in")
    expected = prepare(source, tmp_path / "local", images_per_shard=64)
    store = prepare(source, tmp_path / "shares", images_per_shard=64, only_begin=True)
    assert [make_share(store, number, 4) for number in (3, 1, 0)] == [3, 2, 1]  # the fourth share of three is empty
    assert not (store / "manifest.json").exists()
    assert make_share(store, 2, 4) == 0
    assert contents(store) == contents(expected)
    assert make_share(store, 2, 4) == 0


def test_a_store_that_two_begin_at_once_is_that_of_one(tmp_path, write_particles, monkeypatch):
    source = write_particles(tmp_path / "in")
    expected = prepare(source, tmp_path / "local", images_per_shard=64)
    write_tables = convert.write_tables

    def overtaken(store: Path, *what, **how) -> None:
        command = [
            sys.executable,
            "-m",
            "spire_dist.cli",
            "prep",
            source,
            store,
            "--images-per-shard=64",
            "--share=1/2",
        ]
        subprocess.run(command, check=True)
        write_tables(store, *what, **how)

    monkeypatch.setattr(convert, "write_tables", overtaken)
    store = prepare(source, tmp_path / "store", images_per_shard=64, only_begin=True)
    assert missing_shards(store) == [0, 2]
    (tmp_path / ".store.n7-4711.partial").mkdir()  # of one that was killed while it began
    assert make_share(store, 0, 2) == 0
    assert contents(store) == contents(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "local", "store"]


def test_a_signal_of_slurm_stops_a_share_between_two_pixels(tmp_path, write_particles, monkeypatch):
    store = prepare(write_particles(tmp_path / "in"), tmp_path / "store", images_per_shard=64, only_begin=True)
    monkeypatch.setattr("cluster.prep_jobs.write_shard", lambda store, shard: os.kill(os.getpid(), signal.SIGUSR2))
    with pytest.raises(Stopped, match="share 0/2 unfinished"), queued_again():
        make_share(store, 0, 2)


# ---- a real Slurm


@contextmanager
def caught_at_work(lab: Lab, store: Path, *tasks: int) -> Iterator[None]:
    """Inside the block these jobs of the array stand still, each with some of its shards made and some not."""
    caught, until = dict[int, psutil.Process](), time.monotonic() + 60
    while len(caught) < len(tasks):
        assert time.monotonic() < until, lab.log()
        begun = [task for task in tasks if task not in caught and any(made(store, task))]
        time.sleep(0 if begun else 0.01)
        for process in lab.processes(word="prep") if begun else []:
            with suppress(psutil.Error):
                for task in begun:
                    if f"--share={task}/4" in process.cmdline() and "srun" not in process.name():
                        process.suspend()
                        caught[task] = process
    assert not any(all(made(store, task)) for task in tasks)
    yield
    for process in caught.values():
        with suppress(psutil.NoSuchProcess):
            process.resume()


def made(store: Path, task: int) -> list[bool]:
    """Whether each shard of a share of four is there."""
    return [is_noted(store, shard) for shard in range(task, SHARDS, 4)]


@pytest.mark.slow
def test_an_array_whose_jobs_are_stopped_and_killed_makes_the_bytes_of_one_machine(
    tmp_path, write_particles, slurm: Lab, monkeypatch
):
    source = write_particles(tmp_path / "in", count=1000, box=128, per_stack=400)
    expected = prepare(source, tmp_path / "local", box=BOX, images_per_shard=PER_SHARD)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    store = tmp_path / "store"
    command = ["--array=0-3", "--mem=500", "--time=10", f"--output={tmp_path}/%a.log", SCRIPT, source, store]
    command += ["--box", BOX, "--images-per-shard", PER_SHARD]
    array = slurm.sbatch(*command)
    with caught_at_work(slurm, store, 1, 2):
        slurm.scancel("--signal=USR2", f"{array}_1")  # as before a time limit
        slurm.scancel("--signal=KILL", "--full", f"{array}_2")
    slurm.wait(f"{array}_1", "COMPLETED", restarts=1)
    assert slurm.wait(f"{array}_2", "FAILED", "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: slurm.output("squeue", "--noheader") == "", 60.0, slurm.log)
    missing = missing_shards(store)
    assert missing
    assert set(missing) < set(range(2, SHARDS, 4))
    assert not (store / "manifest.json").exists()
    again = slurm.sbatch(*command)
    for task in range(4):
        slurm.wait(f"{again}_{task}", "COMPLETED")
    assert contents(store) == contents(expected)
