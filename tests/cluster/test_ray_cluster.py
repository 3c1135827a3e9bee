"""A Ray cluster of our own comes and goes without a trace; one that is not there is refused."""

import signal

import psutil
import pytest

from cluster.ray_cluster import ray_cluster
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import ConfigError

pytest.importorskip("ray", reason="needs the extra [ray]")


@pytest.mark.slow
def test_a_cluster_of_our_own_outlives_a_stop_signal_to_the_whole_job_and_ends_with_the_block():
    import ray

    handler, others = signal.getsignal(signal.SIGTERM), psutil.Process().children(recursive=True)
    for _ in range(2):  # the second one is let in too
        with ray_cluster(cpus=1):
            assert signal.getsignal(signal.SIGTERM) is handler
            answer = ray.remote(lambda: 6 * 7)
            assert ray.get(answer.remote()) == 42
            started = set(psutil.Process().children(recursive=True)).difference(others)
            assert any("raylet" in process.name() for process in started)
            for process in started:
                for number in STOP_SIGNALS:
                    process.send_signal(number)
            assert ray.get(answer.remote()) == 42
        assert psutil.wait_procs(started, timeout=20)[1] == []  # none is left


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_refused_in_one_line(address, refusal):
    refusal(ConfigError, [f"Ray at {address}: cannot connect"], lambda: ray_cluster(address).__enter__())
