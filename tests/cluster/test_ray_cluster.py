"""A Ray cluster of our own comes and goes without a trace; one that is not there is refused."""

import signal

import psutil
import pytest

from cluster.ray_cluster import ray_cluster
from spire_dist.errors import ConfigError

pytest.importorskip("ray", reason="needs the extra [ray]")


@pytest.mark.slow
def test_a_cluster_of_our_own_ends_with_the_block_and_leaves_stop_signals_alone():
    handler = signal.getsignal(signal.SIGTERM)
    for _ in range(2):  # the second one is let in too
        with ray_cluster(cpus=1):
            assert signal.getsignal(signal.SIGTERM) is handler
            started = psutil.Process().children(recursive=True)
            assert any("raylet" in process.name() for process in started)
        assert psutil.wait_procs(started, timeout=20)[1] == []  # none is left


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_refused_in_one_line(address, refusal):
    refusal(ConfigError, [f"Ray at {address}: cannot connect"], lambda: ray_cluster(address).__enter__())
