"""Ranks: real processes that talk over gloo, started once for all tests of this folder."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from spire_dist.distributed.mesh import init_distributed

MOST = 4
PATIENCE_S = 120.0

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(function, replicate, gauss, *arguments)`: what `function(mesh, *arguments)` returns on each rank."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(MOST):
        here, there = context.Pipe()
        processes.append(context.Process(target=_serve, args=(there,), daemon=True))
        processes[-1].start()
        pipes.append(here)
    port = 29000 + os.getpid() % 900

    def call(function: Callable[..., Any], replicate: int, gauss: int, *arguments: Any) -> list[Any]:
        nonlocal port
        port += 1
        world = replicate * gauss
        for rank, pipe in enumerate(pipes[:world]):
            place = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            pipe.send((function, gauss, {name: str(value) for name, value in place.items()}, arguments))
        found = []
        for rank, pipe in enumerate(pipes[:world]):
            assert pipe.poll(PATIENCE_S), f"rank {rank} of {world} says nothing"
            result, error = pipe.recv()
            assert error is None, f"rank {rank} of {world}:\n{error}"
            found.append(result)
        return found

    yield call
    for process in processes:
        process.kill()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, gauss, place, arguments = pipe.recv()
        try:
            os.environ.update(place)
            with init_distributed(gauss, "cpu", timeout_s=60) as mesh:
                pipe.send((function(mesh, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
