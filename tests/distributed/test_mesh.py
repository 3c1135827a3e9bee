"""Ranks find their places, whoever starts them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_dist.distributed.mesh import LAUNCH_VARIABLES, Mesh, init_distributed, launch_variables
from spire_dist.errors import ConfigError
from spire_dist.machine import first_node

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
}  # fmt: skip


def test_torchruns_variables_are_taken_as_they_are():
    assert launch_variables(TORCHRUN) == {name: TORCHRUN[name] for name in LAUNCH_VARIABLES}


def test_under_srun_they_are_made_of_slurms():
    found = launch_variables(SRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("5", "8", "1", "gpu007")
    assert found == launch_variables(SRUN | {"SLURM_PROCID": "5"})
    assert launch_variables(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert launch_variables(SRUN | {"MASTER_ADDR": "ib-gpu007"})["MASTER_ADDR"] == "ib-gpu007"


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, SRUN | {"SLURM_NTASKS": "1"}],
    ids=["a shell", "a batch script", "one task"],
)
def test_a_process_that_was_started_alone_is_alone(environment):
    assert launch_variables(environment) == {}


def test_half_of_torchruns_variables_are_refused(refusal):
    some = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    refusal(ConfigError, ["MASTER_PORT", "torchrun"], lambda: str(launch_variables(some)))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("gpu[007-009,012],login", "gpu007"), ("a[3,5]-ib", "a3-ib"),
        ("rack1-[1-2]", "rack1-1"), ("c[10-12]", "c10"), ("n1.cluster.org", "n1.cluster.org"),
    ],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


@given(gauss=st.integers(1, 9), replicate=st.integers(1, 9))
def test_every_rank_has_its_own_place(gauss, replicate):
    world = gauss * replicate
    places = {(rank // gauss, Mesh(rank, world, gauss).gauss_rank) for rank in range(world)}
    assert places == {(r, g) for r in range(replicate) for g in range(gauss)}
    assert Mesh(0, world, gauss).replicate == replicate


def test_one_process_alone_cannot_share_gaussians(refusal, monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def start() -> str:
        with init_distributed(2, "cpu", 10):
            return ""

    refusal(ConfigError, ["parallel.gauss = 2", "1 rank"], start)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("4(x2),3", 0, "4"), ("4(x2),3", 1, "4"), ("4(x2),3", 2, "3"), ("8", 0, "8")]
)
def test_a_rank_under_slurm_knows_how_many_share_its_node(tasks, node, expected):
    found = launch_variables(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert found["LOCAL_WORLD_SIZE"] == expected
