"""`doctor` with several tasks: two processes that have Slurm's variables, and a real Slurm of two nodes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.doctor_compare import a_gpu_each, merge, same_time, seen, settled, summed
from cluster.doctor_slurm import slurm as examine_slurm
from cluster.doctor_tools import Check
from spire_dist.config import JobConfig
from tests.cluster.lab import Lab, free_port

ROOT = Path(__file__).parents[2]
CALL = "import sys; sys.argv[0] = 'spire-dist'; from spire_dist.cli import main; main()"
QUICKLY = "from cluster import doctor_ranks; doctor_ranks.MEET_S = 3.0; "


def start_rank(
    rank: int, *words: object, port: int, before: str = "", command: Sequence[str] = (), **variables: str
) -> subprocess.Popen:
    """One of two tasks on nodes n1 and n2, which are this machine; `before` is Python to run first."""
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": f"n{rank + 1}", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    python = [sys.executable, "-c", before + CALL, "doctor", "--json", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [*command, *python],
        env=environment | slurm | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def findings(process: subprocess.Popen, code: int) -> dict[str, Check]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == code, out + errors
    return {entry["name"]: Check(**entry) for entry in json.loads(out or "[]")}


def test_two_ranks_meet_compare_and_the_first_tells_for_both(tmp_path: Path):
    port = free_port()
    ranks = [start_rank(rank, "--run", tmp_path / "run", port=port) for rank in (0, 1)]
    found = findings(ranks[0], 0)
    assert findings(ranks[1], 0) == {}
    assert found["meeting"].found == f"2 ranks on n1, n2 met at 127.0.0.1:{port}"
    assert found["all-reduce (gloo)"].found.startswith("sum over 2 ranks right")
    assert "the same on n1, n2" in found["same versions"].found
    for name in ("shared files", "shared locks", "clocks", "ports", "writing"):
        assert found[name].level == "OK", name
    # The nodes see each other's files, whatever the type of the file system.
    assert found["file system"].level == "OK"
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_differs_is_named(tmp_path: Path):
    """Another version, a clock that is fast, and a folder of its own in place of the shared one."""
    shared, port = tmp_path / "shared", free_port()
    shared.mkdir()
    old = tmp_path / "old" / "zarr-3.1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 3.1.0\n")
    fast = "import time; real = time.time; time.time = lambda: real() + 30; "
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shared} && exec "$@"', "sh"]
    can_hide = subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode == 0
    quickly = "from cluster import doctor_ranks; doctor_ranks.SEEN_S = 1.0; "
    ranks = [
        start_rank(0, "--run", shared, port=port, before=quickly),
        start_rank(
            1, "--run", shared, port=port, before=quickly + fast, command=hidden if can_hide else (),
            PYTHONPATH=str(tmp_path / "old"),
        ),
    ]  # fmt: skip
    found = findings(ranks[0], 2)
    assert findings(ranks[1], 0) == {}
    assert found["same versions"].level == "MISS"
    assert "n2: zarr 3.1.0, not " in found["same versions"].found
    assert found["clocks"].level == "WARN"
    assert "n2 by +30" in found["clocks"].found
    if can_hide:
        assert found["file system"].found.startswith(f"n2: {shared}: tmpfs")
        assert found["shared files"].level == "MISS"
        assert "n2 does not see what n1 writes" in found["shared files"].found
        assert "n1 does not see what n2 writes" in found["shared files"].found
    assert list(shared.iterdir()) == []


def test_a_rank_that_does_not_come_is_named_and_the_others_end(tmp_path: Path):
    found = findings(start_rank(0, "--run", tmp_path, port=free_port(), before=QUICKLY), 2)
    assert found["meeting"].level == "MISS"
    assert found["meeting"].found.startswith("rank 1 of 2 did not come to 127.0.0.1:")
    assert "writing" in found
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_reach_the_first_says_so_itself():
    port = free_port()
    found = findings(start_rank(1, port=port, before=QUICKLY), 2)
    assert list(found) == ["meeting"]
    assert found["meeting"].found.startswith(f"rank 1 on n2 cannot reach rank 0 at 127.0.0.1:{port}")


def test_a_port_that_another_program_has_is_told(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()  # and never answers
        port = taken.getsockname()[1]
        ranks = [start_rank(rank, "--run", tmp_path, port=port, before=QUICKLY) for rank in (0, 1)]
        found = findings(ranks[0], 2)
        assert findings(ranks[1], 2)["meeting"].level == "MISS"
    assert found["ports"].found == f"{port}, of this job, is taken"
    assert "cannot open" in found["meeting"].found


# ---- a real Slurm


def test_srun_examines_the_nodes_of_a_cluster(slurm: Lab, tmp_path: Path):
    command = [sys.executable, "-m", "spire_dist.cli", "doctor", "--json", "--run", str(tmp_path / "run")]
    result = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=2", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line != "[]"]  # of the other task
    found = {entry["name"]: Check(**entry) for entry in json.loads("\n".join(lines))}
    for name in (
        "Slurm commands",
        "Slurm controller",
        "munge",
        "meeting",
        "all-reduce (gloo)",
        "shared files",
        "node names",
    ):
        assert found[name].level == "OK", found[name]
    assert found["meeting"].found.startswith("2 ranks on n1, n2 met at ")
    assert found["time limit"].found == "the run saves, and its job queues itself again with scontrol requeue"
    settings = slurm.conf.read_text()
    grace, kill = (int(settings.partition(f"{name}=")[2].split()[0]) for name in ("GraceTime", "KillWait"))
    assert f"{grace + kill} s to save (GraceTime {grace} + KillWait {kill})" in found["preemption"].found
    assert "within about 10 s" in found["node loss"].found


def test_a_gpu_that_torch_cannot_see_and_limits_of_the_partition_are_told(slurm: Lab, tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text("[data]\nstore = 'nothing.zarr'\n")
    command = [sys.executable, "-m", "spire_dist.cli", "doctor", "--json", str(config), "--run", str(tmp_path)]
    slurm.output("scontrol", "update", "partitionname=main", "maxtime=60")
    try:
        result = subprocess.run(["srun", "--gpus=1", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        slurm.output("scontrol", "update", "partitionname=main", "maxtime=UNLIMITED")
    assert result.returncode == 2, result.stdout + result.stderr
    found = {entry["name"]: Check(**entry) for entry in json.loads(result.stdout)}
    assert found["GPUs"].level == "MISS"
    assert "Slurm gave 0" in found["GPUs"].found or "this machine has" in found["GPUs"].found
    assert found["partition"].found == "main allows 60 minutes, job.time_min = 1440"
    assert found["partition"].fix.startswith("set job.time_min = 60")
    assert found["store"].level == "MISS"


def test_on_a_login_node_the_partition_must_exist_and_be_large_enough(slurm: Lab):
    wrong = named("partition", examine_slurm({}, JobConfig(partition="nope")))
    assert (wrong.level, wrong.found) == ("MISS", "job.partition = 'nope' does not exist")
    slurm.output("scontrol", "update", "partitionname=high", "maxnodes=1")
    small = named("partition", examine_slurm({}, JobConfig(partition="high", nodes=2)))
    assert (small.level, small.fix) == ("MISS", "set job.nodes = 1")
    well = {check.name: check for check in examine_slurm({}, JobConfig(partition="high"))}
    assert well["partition"].found == "high, at most any time a job"
    assert well["preemption"].found == "jobs here are never preempted"
    assert "srun -n1 spire-dist doctor tells whether compute nodes have it" in well["time limit"].found


def named(name: str, checks: list[Check]) -> Check:
    return next(check for check in checks if check.name == name)


# ---- what is made of many answers


def test_findings_of_nodes_are_one_line_that_names_who_differs():
    well, worse = Check("munge", "OK", "gives credentials"), Check("munge", "MISS", "no socket", "start munged")
    slow = Check("writing", "WARN", "4 MiB in 1500 ms", "wait")
    assert merge([("n1", [well]), ("n2", [well])]) == [well]
    assert merge([("n1", [worse]), ("n2", [worse])]) == [worse]
    nodes = [(f"n{number}", [worse if number > 1 else well]) for number in range(1, 8)]
    assert merge(nodes) == [Check("munge", "MISS", "n2, n3, n4, n5 and 2 more: no socket", "start munged")]
    mixed = merge(
        [("n1", [well, slow]), ("n2", [worse]), ("n3", [Check("writing", "WARN", "4 MiB in 1600 ms", "wait")])]
    )
    assert [check.found for check in mixed] == ["n2: no socket", "n1: 4 MiB in 1500 ms; n3: 4 MiB in 1600 ms"]


def test_a_doubt_about_names_is_none_once_ranks_have_met():
    doubt = Check("node names", "WARN", "n1 does not resolve", "hosts")
    good = [Check("meeting", "OK", "met"), Check("all-reduce (gloo)", "OK", "right")]
    assert settled([doubt, *good])[0] == Check("node names", "OK", "n1 does not resolve; ranks meet all the same")
    assert settled([doubt, good[0]])[0] == doubt


def test_two_tasks_on_one_gpu_and_a_task_without_one_are_told():
    nodes = {0: "n1", 1: "n1"}
    alone = {0: {"gpus": ["a", "b"], "local": 0}, 1: {"gpus": ["a", "b"], "local": 1}}
    assert a_gpu_each(nodes, alone) == [Check("a GPU each", "OK", "2 GPUs for 2 ranks")]
    bound = {0: {"gpus": ["a"], "local": 0}, 1: {"gpus": ["b"], "local": 1}}
    assert a_gpu_each(nodes, bound)[0].found == "rank 1 is number 1 (from 0) of n1 and sees 1 GPU(s)"
    twice = {0: {"gpus": ["a"], "local": 0}, 1: {"gpus": ["b", "a"], "local": 1}}
    assert a_gpu_each(nodes, twice)[0].level == "MISS"
    assert a_gpu_each(nodes, {0: {"gpus": [], "local": 0}}) == []


def test_a_sum_that_fails_or_is_wrong_is_told():
    nodes, good = {0: "n1", 1: "n2"}, {"right": True, "latency_ms": 1.0, "gb_per_s": 1.0}
    report = {"gloo": good, "nccl": good, "error": None, "gpus": ["a"]}
    assert [check.level for check in summed(nodes, {0: report, 1: report})] == ["OK", "OK"]
    wrong = report | {"gloo": good | {"right": False}}
    assert summed(nodes, {0: report, 1: wrong})[0].found == "rank 1 got a wrong sum"
    failed = report | {"nccl": None, "error": "NCCL error: unhandled system error"}
    gloo, nccl = summed(nodes, {0: report, 1: failed})
    assert (gloo.level, nccl.level) == ("OK", "MISS")
    assert nccl.found == "rank 1 on n2: NCCL error: unhandled system error"


def test_files_that_come_late_and_locks_that_are_not_seen_are_told():
    nodes = {0: "n1", 1: "n2"}
    late = {0: {"1": {"seconds": 9.0, "locked": False}}, 1: {"0": {"seconds": 0.0, "locked": True}}}
    files, locks = seen(nodes, late)
    assert (files.level, locks.level) == ("WARN", "WARN")
    assert locks.found == "n1 does not see the lock of n2"
    unable = seen(nodes, {0: {"1": {"seconds": None}}, 1: {"error": "Read-only file system"}})[0]
    assert unable.level == "MISS"
    assert "n2 cannot write (Read-only file system)" in unable.found
    assert same_time(nodes, {1: -3.0})[0].found == "off from n1: n2 by -3.0 s"
