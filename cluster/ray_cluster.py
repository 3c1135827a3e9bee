"""A Ray cluster for a while: one that runs already, or one of this process that ends with it.

Called by `prep_jobs.py` and `ray_loader.py`. Its workers run the very code of this process, wherever they are: the packages
are sent to them, so that a checkout needs no installation and no node works with another version.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import ConfigError, SpireError
from spire_dist.machine import cores

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

PACKAGES = ("cluster", "data_prep", "spire_dist")
SMALLEST_OBJECT_STORE = 80 * 2**20
"""Bytes; Ray takes no less."""


@contextmanager
def ray_cluster(
    address: str | None = None, cpus: int | None = None, object_store_bytes: int = SMALLEST_OBJECT_STORE
) -> Iterator[None]:
    """Inside the block this process is connected to a Ray cluster.

    `address` is "auto" for one that runs on this machine, "host:port" or "ray://host:port". Without it the variable
    RAY_ADDRESS counts, else a cluster of this machine is started, with `cpus` cores (default: all) and room for
    `object_store_bytes` of shared objects, and stopped at the end. A connection that is there already is used and kept.
    Raises ConfigError where Ray is not installed or nothing answers.
    """
    address = require_ray(address)
    if "RAY_AUTH_TOKEN" in os.environ:  # which a client does not look for unless it is told
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        yield
        return
    root = Path(__file__).parents[1]
    options = {"runtime_env": {"py_modules": [str(root / name) for name in PACKAGES]}, "log_to_driver": False}
    if address == "local":
        options |= {
            "num_cpus": cpus or cores(),
            "object_store_memory": max(object_store_bytes, SMALLEST_OBJECT_STORE),
            "include_dashboard": False,
        }
        # Else Ray leaves a token in the user's home, and reports its use. It remembers the token it first met.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers would stand behind everything else of this machine: readers behind the training that waits for them.
        os.environ.setdefault("RAY_worker_niceness", "0")
    with _untouched_by_stop_signals():
        try:
            ray.init(address, logging_level=logging.ERROR, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_there(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def told_by_a_worker(error: "RayTaskError") -> Exception:
    """What a task or actor raised: a user's mistake as it would be told without Ray, anything else with its traceback."""
    return error.cause if isinstance(error.cause, SpireError | OSError) else error


def require_ray(address: str | None) -> str:
    """The address that `ray_cluster` will use. Raises ConfigError where Ray is not installed or nobody listens there."""
    if find_spec("ray") is None:
        raise ConfigError("ray is not installed; pip install 'spire-dist[ray]'")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        try:  # Ray itself would go on trying for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise _not_there(address, error) from error
    return address


def _not_there(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(f"Ray at {address}: cannot connect ({reason}); is the cluster running?")


@contextmanager
def _untouched_by_stop_signals() -> Iterator[None]:
    """What is started inside the block never sees a stop signal, and this process keeps its handlers.

    A batch system sends TERM and USR2 to every process of a job; training saves then, and needs its readers until it has.
    Ray, for its part, takes over the handler of TERM.
    """
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
