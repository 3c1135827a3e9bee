"""A Ray cluster of three nodes, each with its own raylet, one of which is killed in the middle of the work."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.convert import prepare
from data_prep.shards import missing_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a node has an address of its own on the loopback device"),
]

TASK, READER = "ray::_make_shard", "ray::Reader"
"""What Ray calls a process that makes a shard, and one that reads blocks."""
CLI = [sys.executable, "-m", "spire_dist.cli"]

AT_NODE = """
import sys, ray
ray.init(sys.argv[1], _node_ip_address=sys.argv[2], logging_level="ERROR", log_to_driver=False)
sys.argv[1:3] = []
from spire_dist.cli import main
main()
"""
"""`spire-dist` at another node than the one that Ray would choose on this machine."""


@dataclass
class Node:
    """A node that can be killed."""

    address: str
    raylet: psutil.Process

    def processes(self, name: str) -> list[psutil.Process]:
        """Its workers that are called so now."""
        found = []
        for process in self.raylet.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == [name] or process.name().startswith(name[:15]):
                    found.append(process)
        return found

    def kill(self) -> None:
        """All of it at once, as when the power fails."""
        self.raylet.suspend()
        for process in (self.raylet, *self.raylet.children(recursive=True)):
            process.kill()


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Any]:
    """The cluster, so far of its head, which learns of a node's death in seconds."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(ray_nodes) -> list[Node]:
    """Two more nodes of one core, those that an earlier test left alive among them."""
    for node in list(ALIVE):
        if not node.raylet.is_running() or node.raylet.status() == psutil.STATUS_ZOMBIE:
            ALIVE.remove(node)
    while len(ALIVE) < 2:
        address = f"127.0.0.{next(NUMBERS)}"
        started = ray_nodes.add_node(num_cpus=1, include_dashboard=False, node_ip_address=address)
        ALIVE.append(Node(address, psutil.Process(started.all_processes["raylet"][0].process.pid)))
    return list(ALIVE)


ALIVE: list[Node] = []
NUMBERS = count(2)


def at(cluster: Any, node: Node) -> list[str]:
    """How `spire-dist` is called at a node."""
    return [sys.executable, "-c", AT_NODE, cluster.address, node.address]


PATIENCE_S = 240.0
"""Until something hangs: on a busy machine the workers of a new node have taken 95 s to their first shard."""


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain"
        time.sleep(0.02)
    return found


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- preparation -----------------------------------------------------------------------------------------------------

BOX, PER_SHARD, SHARDS = 80, 64, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_particles) -> Path:
    return write_particles(tmp_path_factory.mktemp("source") / "in", count=1000, box=128, per_stack=400)


@pytest.fixture(scope="module")
def expected(source) -> dict[str, str]:
    """What one machine makes of it."""
    return contents(prepare(source, source.parent / "local", box=BOX, images_per_shard=PER_SHARD))


def prep(address: str, source: Path, store: Path) -> list[str]:
    """Arguments of the command line."""
    options = [f"--box={BOX}", f"--images-per-shard={PER_SHARD}", "--engine=ray", f"--ray-address={address}"]
    return ["prep", str(source), str(store), *options]


def kill_at_work(node: Node, store: Path) -> list[int]:
    """Kill a node while it makes a shard, when some shards are there; returns those that were not."""

    def caught() -> bool:
        if len(list((store / ".prep").glob("*.json"))) < 2:
            return False
        for worker in node.processes(TASK):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.suspend()
                if worker.cmdline()[:1] == [TASK]:  # still
                    node.kill()
                    return True
                worker.resume()
        return False

    wait_until(caught)
    return missing_shards(store)


def test_prep_that_loses_a_node_makes_the_bytes_of_one_machine(ray_nodes, nodes, source, expected, tmp_path):
    with subprocess.Popen([*CLI, *prep(ray_nodes.address, source, tmp_path / "ray")]) as command:
        missing = kill_at_work(nodes[0], tmp_path / "ray")
        assert command.wait(PATIENCE_S) == 0
    assert 0 < len(missing) < SHARDS
    assert contents(tmp_path / "ray") == expected


def test_prep_whose_own_node_is_lost_ends_in_one_line_and_goes_on_when_called_again(
    ray_nodes, nodes, source, expected, tmp_path
):
    command = [*at(ray_nodes, nodes[1]), *prep(ray_nodes.address, source, tmp_path / "ray")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
        missing = kill_at_work(nodes[1], tmp_path / "ray")
        told = killed.communicate(timeout=PATIENCE_S)[1]
    assert killed.returncode == 2
    assert "Ray has died on" in told.strip().splitlines()[-1]
    assert 0 < len(missing) < SHARDS
    assert contents(prepare(source, tmp_path / "ray", box=BOX, images_per_shard=PER_SHARD)) == expected


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A training run as a process, stopped (in the sense of a debugger) while a test looks and kills."""

    run: Path
    process: subprocess.Popen[str]

    def reach(self, step: int) -> int:
        """Let it go on beyond a step of its first stage, and stop it there; returns the step."""
        self.process.send_signal(signal.SIGCONT)
        wait_until(lambda: self.process.poll() is not None or self.step() > step)
        self.process.send_signal(signal.SIGSTOP)
        found = self.step()
        assert step < found < STEPS
        return found

    def step(self) -> int:
        """Of its last log line; that of the second stage counts on."""
        log = self.run / "metrics.jsonl"
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        records = [json.loads(line) for line in whole.splitlines()]
        return records[-1]["step"] + (STEPS if records[-1]["stage"] == 2 else 0) if records else 0

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        self.process.send_signal(signal.SIGCONT)
        told = self.process.communicate(timeout=PATIENCE_S)[1]
        return self.process.returncode, told


STEPS = 320
"""Of the first stage: each epoch of eight is one block of the loader."""
RESULTS = ("latents.npy", "parts.npy", "stage1/latents.npy", "stage1/parts.npy")


@pytest.fixture
def train(tiny_settings) -> Iterator[Callable[..., Training]]:
    """`train(run, loader, *command)` starts a training run."""
    begun: list[subprocess.Popen[str]] = []

    def start(run: Path, loader: str, *command: str, **environment: str) -> Training:
        settings = [
            *tiny_settings,
            f"stage1.epochs={STEPS // 8}",
            "output.save_seconds=0.5",
            "output.report=false",
            f"data.loader={loader}",
        ]
        words = [
            *(command or CLI),
            "train",
            "--run",
            str(run),
            *(word for value in settings for word in ("--set", value)),
        ]
        begun.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | environment))
        return Training(run, begun[-1])

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_training_goes_on_when_another_node_its_readers_and_ray_itself_are_killed(ray_nodes, nodes, train, tmp_path):
    plain = train(tmp_path / "plain", "local")
    assert plain.end()[0] == 0
    lost = train(tmp_path / "lost", "ray", *at(ray_nodes, nodes[0]), RAY_ADDRESS=ray_nodes.address)
    kept = train(tmp_path / "kept", "ray", *at(ray_nodes, nodes[1]), RAY_ADDRESS=ray_nodes.address)
    step = kept.reach(16)
    wait_until(lambda: (lost.run / "latest").exists())
    lost.reach(16)

    # A machine is gone, with the run and the readers on it.
    assert len(nodes[0].processes(READER)) == 2
    lost.process.kill()
    nodes[0].kill()
    step = kept.reach(step + 16)

    # The readers of this one.
    readers = nodes[1].processes(READER)
    assert len(readers) == 2
    for reader in readers:
        reader.kill()
    step = kept.reach(step + 32)
    wait_until(lambda: len(nodes[1].processes(READER)) == 2)  # the second may still be on its way
    assert not set(readers) & set(nodes[1].processes(READER))

    # Ray, but not the run.
    nodes[1].kill()
    code, told = kept.end()
    assert (code, "Ray has died on" in told) == (0, True)
    assert results(kept.run) == results(plain.run)

    # The run of the lost machine goes on at another node.
    again = train(lost.run, "ray", RAY_ADDRESS=ray_nodes.address)
    assert again.end()[0] == 0
    assert results(lost.run) == results(plain.run)


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}
