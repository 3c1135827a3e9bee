"""Shards made by a Ray cluster of two nodes and by a real Slurm: the bytes of one machine, whatever is killed meanwhile."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mrcfile
import psutil
import pytest

from cluster.prep_jobs import choose_engine, ray_engine
from cluster.ray_cluster import ray_cluster
from data_prep.convert import prepare
from spire_dist.errors import ConfigError, SourceError, StoreError

PER_SHARD = 64
TASK = "ray::_make_shard"
"""What Ray calls a worker that makes a shard."""


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Connected to a Ray cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_TOKEN"] = "of-a-test"  # else Ray leaves one in the home directory
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    with ray_cluster(cluster.address):
        yield
    cluster.shutdown()
    del os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "compact"])
def test_ray_makes_the_bytes_of_one_machine(tmp_path, write_particles, two_nodes, dtype):
    source = write_particles(tmp_path / "in", count=500)
    options = {"images_per_shard": PER_SHARD, "dtype": dtype}
    expected = prepare(source, tmp_path / "local", **options)
    store = prepare(source, tmp_path / "ray", engine=ray_engine, **options)
    assert len(list((store / ".prep").iterdir())) == 8
    assert contents(store) == contents(expected)


@pytest.mark.slow
def test_a_ray_worker_killed_in_its_task_changes_nothing(tmp_path, write_particles, two_nodes):
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
def test_a_ray_workers_refusal_is_the_one_line_of_one_machine(tmp_path, write_particles, two_nodes, refusal):
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
def test_a_node_that_does_not_see_the_store_is_named(tmp_path, two_nodes, refusal):
    words = [str(tmp_path / "elsewhere"), "not there on", "all nodes"]
    refusal(StoreError, words, lambda: list(ray_engine(tmp_path / "elsewhere", [0])))


def test_an_engine_that_is_not_known_is_refused_with_those_that_are(refusal):
    refusal(ConfigError, ["--engine dask", "local, ray or slurm"], lambda: choose_engine("dask"))
