"""Blocks read by actors of a Ray cluster: the bits of the plain loader, for one rank or two, whatever is killed."""

import contextlib
import os
import subprocess
import sys
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from cluster import ray_loader
from cluster.ray_loader import Part, Pool, Reader, ray_blocks
from data_prep.convert import prepare
from spire_dist.cli import app
from spire_dist.config import RunConfig
from spire_dist.data.blocks import Blocks
from spire_dist.data.loader import BatchSource
from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.errors import StoreError

BATCH, STEPS = 4, 160
"""A block is 256 of the 500 particles, which are in chunks of 4; the steps go into a second epoch."""


@pytest.fixture(scope="module", params=["float16", "compact"])
def store(request, tmp_path_factory, write_particles) -> ParticleStore:
    folder = tmp_path_factory.mktemp("blocks")
    source = write_particles(folder / "in", count=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.images_per_chunk", lambda box, itemsize: 4)
        return ParticleStore.open(prepare(source, folder / "store", images_per_shard=128, dtype=request.param))


def order_of(store: ParticleStore) -> Order:
    return Order(store.count, store.images_per_chunk, BATCH, 0)


@pytest.mark.parametrize("virtual_readers", [4, 2])
@pytest.mark.parametrize(("world", "local"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_ranks_of_a_node_share_one_reading_and_get_what_each_would_read(
    store, monkeypatch, world, local, virtual_readers
):
    monkeypatch.setattr("spire_dist.data.order.MOST_READERS", virtual_readers)
    order, reads = order_of(store), []
    assert order.readers == virtual_readers  # of 4 ranks two share one of 2
    reader = Reader(store.path)
    read = type(store.images).read
    monkeypatch.setattr(type(store.images), "read", lambda self, runs: reads.append(runs) or read(self, runs))
    for block in range(2 * order.blocks_per_epoch):
        for rank in range(world):
            found = reader.read(Part(order, block, rank, world, local))
            np.testing.assert_array_equal(found, read(store.images, order.portion(block, rank, world).runs))
    assert len(reads) == 2 * order.blocks_per_epoch * world // local


def test_a_rank_that_comes_late_or_again_gets_its_part_all_the_same(store):
    order, reader = order_of(store), Reader(store.path)
    for block in (0, 1, 2, 3, 0, 3, 3):
        part = Part(order, block, 1, 2, 2)
        np.testing.assert_array_equal(reader.read(part), store.images.read(order.portion(block, 1, 2).runs))


@pytest.mark.parametrize(("address", "sharing"), [("local", 1), ("auto", 2)])
def test_a_rank_with_a_cluster_of_its_own_reads_its_part_alone(store, monkeypatch, tmp_path, address, sharing):
    asked: list[Part] = []
    monkeypatch.setattr(ray_loader, "ray_cluster", lambda *where, **more: nullcontext())
    monkeypatch.setattr(ray_loader, "require_ray", lambda given: address)
    monkeypatch.setattr(Pool, "ask", lambda self, part: asked.append(part))
    monkeypatch.setattr(Pool, "take", lambda self, part, answer: Reader(store.path).read(part))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    order = order_of(store)
    with ray_blocks(store.path, tmp_path, BATCH) as blocks, closing(blocks(order, 1, 2, 0)) as reading:
        np.testing.assert_array_equal(next(reading), store.images.read(order.portion(0, 1, 2).runs))
    assert {part.local for part in asked} == {sharing}


@pytest.mark.parametrize(("batch", "images"), [(4, 256), (300, 300), (10_000, 500)])
def test_the_object_store_has_room_for_blocks_of_any_batch(store, monkeypatch, tmp_path, batch, images):
    started: list[dict[str, int]] = []
    monkeypatch.setattr(ray_loader, "ray_cluster", lambda *where, **room: nullcontext(started.append(room)))
    monkeypatch.setattr(ray_loader, "require_ray", lambda given: "local")
    with ray_blocks(store.path, tmp_path, batch, readers=3):
        image_bytes = 16 * 16 * store.images.dtype.itemsize
        assert started == [{"cpus": 3, "object_store_bytes": 5 * images * image_bytes}]


RANK = """
import sys
from itertools import islice
from pathlib import Path
from typing import Any
import numpy as np, ray, torch
from cluster.ray_loader import ray_blocks
from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
store, out, rank, world, batch, steps = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
with ray_blocks(store, store / "run", batch) as blocks:
    source = BatchSource(ParticleStore.open(store), blocks=blocks)
    batches = list(islice(source.training(source.order(batch, 0), 1, rank, world), steps))
    actors = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    np.savez(out, rows=torch.cat([b.rows for b in batches]), images=torch.cat([b.images for b in batches]), actors=actors)
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_those_of_the_plain_loader_and_ranks_share_readers(store, two_nodes, tmp_path, world):
    environment = os.environ | {"RAY_ADDRESS": two_nodes, "LOCAL_WORLD_SIZE": str(world)}
    ranks = []
    for rank in range(world):
        numbers = [str(number) for number in (rank, world, BATCH, STEPS)]
        command = [sys.executable, "-c", RANK, store.path, tmp_path / f"{rank}.npz", *numbers]
        ranks.append(subprocess.Popen(command, env=environment))
    assert [rank.wait(120) for rank in ranks] == [0] * world
    source, seen = BatchSource(store), set()
    for rank in range(world):
        found = np.load(tmp_path / f"{rank}.npz")
        plain = list(islice(source.training(order_of(store), 1, rank, world), STEPS))
        np.testing.assert_array_equal(found["rows"], np.concatenate([batch.rows for batch in plain]))
        np.testing.assert_array_equal(found["images"], np.concatenate([batch.images for batch in plain]))
        seen.update(found["actors"].tolist())
    assert len(seen) == 2


def reader_processes() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::Reader"):
                found.add(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("store", ["float16"], indirect=True)
def test_readers_that_are_killed_are_replaced_and_no_particle_is_lost_or_repeated(store, two_nodes, tmp_path):
    import ray

    order, run = order_of(store), tmp_path / "killed"
    others, seen = reader_processes(), set()  # those of an earlier test may be about to leave
    with ray_blocks(store.path, run, BATCH, address=two_nodes) as blocks, closing(blocks(order, 0, 1, 0)) as reading:
        for block, images in enumerate(islice(reading, 20)):
            np.testing.assert_array_equal(images, store.images.read(order.portion(block).runs))
            alive = reader_processes() - others
            seen |= alive
            if block == 4:
                alive.pop().kill()
            if block == 10:
                names: list[Any] = ray.util.list_named_actors(all_namespaces=True)
                ray.kill(ray.get_actor(**next(entry for entry in names if entry["name"].startswith(run.name))))
    assert len(seen) == 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize("store", ["float16"], indirect=True)
def test_a_damaged_shard_is_named_as_the_plain_loader_names_it(store, two_nodes, tmp_path, refusal):
    (store.path / "images" / "c" / "1" / "0" / "0").rename(tmp_path / "shard")
    try:
        with ray_blocks(store.path, tmp_path / "run", BATCH, address=two_nodes) as blocks:
            refusal(
                StoreError, ["images/c/1/0/0", "damaged"], lambda: list(islice(blocks(order_of(store), 0, 1, 0), 4))
            )
    finally:
        (tmp_path / "shard").rename(store.path / "images" / "c" / "1" / "0" / "0")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["float16"], indirect=True)
def test_the_command_hands_the_readers_to_training(store, two_nodes, tmp_path, monkeypatch):
    taken = []

    def train(config: RunConfig, run: Path, blocks: Blocks) -> None:
        taken.append(next(blocks(order_of(store), 0, 1, 3)).copy())

    monkeypatch.setattr("spire_dist.training.train.train", train)
    monkeypatch.setattr("spire_dist.results.export.export", lambda *args, **more: None)
    monkeypatch.setattr("spire_dist.results.report.write_report", lambda run: run)
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    command = ["train", "--store", str(store.path), "--run", str(tmp_path / "run"), "--set", "data.loader=ray"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    np.testing.assert_array_equal(taken, [store.images.read(order_of(store).portion(3).runs)])
