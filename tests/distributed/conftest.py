"""Ranks: real processes that talk over gloo, started once for all tests of this folder."""

import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from spire_dist.distributed.mesh import LAUNCH_VARIABLES, init_distributed

MOST = 4
PATIENCE_S = 120.0

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(function, replicate, gauss, *arguments)`: what `function(mesh, *arguments)` returns on each rank."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []

    def start() -> None:
        for _ in range(MOST):
            here, there = context.Pipe()
            processes.append(context.Process(target=_serve, args=(there,), daemon=True))
            processes[-1].start()
            pipes.append(here)

    def end() -> None:
        for process in processes:
            process.kill()
        processes.clear()
        pipes.clear()

    def call(function: Callable[..., Any], replicate: int, gauss: int, *arguments: Any) -> list[Any]:
        if not processes:
            start()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        world = replicate * gauss
        for rank, pipe in enumerate(pipes[:world]):
            values = rank, world, rank, "localhost", port
            place = dict(zip(LAUNCH_VARIABLES, map(str, values), strict=True))
            pipe.send((function, gauss, place, arguments))
        found, until = dict[int, Any](), time.monotonic() + PATIENCE_S
        try:
            while len(found) < world:  # the first that fails tells why, the others may wait for it
                rank = next((r for r, pipe in enumerate(pipes[:world]) if r not in found and pipe.poll(0.01)), None)
                assert rank is not None or time.monotonic() < until, f"of {world} ranks only {sorted(found)} answer"
                if rank is not None:
                    found[rank], error = pipes[rank].recv()
                    assert error is None, f"rank {rank} of {world}:\n{error}"
        except BaseException:
            end()  # the next test has others
            raise
        return [found[rank] for rank in range(world)]

    yield call
    end()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    while True:
        function, gauss, place, arguments = pipe.recv()
        try:
            os.environ.update(place)
            with init_distributed(gauss, "cpu", timeout_s=60, groups=True) as mesh:
                pipe.send((function(mesh, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
        if "deepspeed" in sys.modules:  # it keeps the groups of the ranks it has met first
            sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
            importlib.reload(sys.modules["deepspeed.utils.groups"])
            sys.modules[
                "deepspeed.runtime.zero.partition_parameters"
            ].Init.param_id = 0  # counted on by ranks that took part
            torch.nn.functional.linear = linear  # which ZeRO-3 replaces for the whole process
