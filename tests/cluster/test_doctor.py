"""Each check of one machine fails for a real reason: a folder that cannot be written, a port that is taken, a wrong version."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import doctor_machine, doctor_places, doctor_slurm
from cluster.doctor import as_json, table
from cluster.doctor_here import check_config
from cluster.doctor_tools import Check, UnansweredError, ask_all, in_child, run_command
from spire_dist.config import load_config

ROOT = Path(__file__).parents[2]


def doctor(
    *words: object, folder: Path = ROOT, code: int | None = None, **variables: str
) -> tuple[dict[str, Check], subprocess.CompletedProcess]:
    """`spire-dist doctor --json` in a process of its own, outside any Slurm job: findings by name."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | variables
    command = [sys.executable, "-m", "spire_dist.cli", "doctor", "--json", *map(str, words)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode in ((0, 2) if code is None else (code,)), result.stdout + result.stderr
    return {entry["name"]: Check(**entry) for entry in json.loads(result.stdout)}, result


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1
    return checks[0]


def named(name: str, checks: list[Check]) -> Check:
    return next(check for check in checks if check.name == name)


# ---- the whole


def test_a_machine_that_is_well_has_nothing_missing_and_keeps_no_file(tmp_path: Path):
    found, _ = doctor("--run", tmp_path / "new" / "run", code=0)
    wanted = {
        "Python",
        "packages",
        "own packages",
        "GPUs",
        "open files",
        "file system",
        "writing",
        "file locks",
        "ports",
    }
    assert wanted <= set(found)
    assert {check.level for check in found.values()} <= {"OK", "WARN"}
    assert not [check for check in found.values() if "\n" in check.found + check.fix]
    assert not [check for check in found.values() if (check.level == "OK") == bool(check.fix)]
    assert list(tmp_path.iterdir()) == []


def test_one_call_tells_of_everything_that_is_wrong_and_ends_with_two(tmp_path: Path):
    bin_, shadow = tmp_path / "bin", tmp_path / "shadow"
    write_command(
        bin_ / "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'"
    )
    (shadow / "cluster").mkdir(parents=True)
    (shadow / "cluster" / "__init__.py").touch()
    old = shadow / "numpy-1.26.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.0\n")
    config = tmp_path / "config.toml"
    config.write_text("[data]\nstorre = 1\n")
    path = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(shadow)}
    found, result = doctor(config, "--run", "/proc/no/run", **path, code=2)
    assert (found["packages"].level, found["own packages"].level) == ("MISS", "MISS")
    assert "numpy 1.26.0 (needs <3,>=2.0)" in found["packages"].found
    assert found["packages"].fix == "pip install 'numpy<3,>=2.0'"
    assert f"{shadow}/cluster/__init__.py, which is not ours" in found["own packages"].found
    assert found["writing"].level == "MISS"
    assert found["writing"].found.startswith("/proc: ")
    assert "storre" in found["configuration"].found
    if "CPU build" in found["GPUs"].found:
        assert found["GPUs"].level == "MISS"
        assert "but this machine has 2" in found["GPUs"].found
    assert result.stderr == ""


def test_table_has_a_line_per_finding_the_fix_below_and_the_count():
    checks = [Check("Python", "OK", "3.11.7"), Check("free space", "MISS", "0.2 GiB", "make room")]
    assert table(checks).splitlines() == [
        "OK    Python      3.11.7",
        "MISS  free space  0.2 GiB",
        "                  fix: make room",
        "",
        "1 OK, 0 WARN, 1 MISS",
    ]
    assert table([]) == ""
    assert json.loads(as_json(checks))[1] == {
        "name": "free space",
        "level": "MISS",
        "found": "0.2 GiB",
        "fix": "make room",
    }


# ---- nothing hangs


def test_a_probe_that_hangs_or_fails_is_a_finding_and_the_others_are_heard():
    probes: dict[str, Callable[[], list[Check]]] = {
        "hangs": lambda: time.sleep(60) or [],
        "fails": lambda: [Check("never", "OK", str(1 // 0))],
        "works": lambda: [Check("works", "OK", "yes")],
    }
    start = time.monotonic()
    found = ask_all(probes, seconds=0.5)
    assert time.monotonic() - start < 30
    assert [(check.name, check.level) for check in found] == [("hangs", "MISS"), ("fails", "WARN"), ("works", "OK")]
    assert found[0].found == "no answer within 0.5 s"
    assert "ZeroDivisionError" in found[1].found


def test_a_child_that_hangs_is_left_behind_and_one_that_fails_says_why():
    with pytest.raises(UnansweredError, match=r"no answer within 0\.5 s"):
        in_child("time", "sleep", [60], seconds=0.5)
    with pytest.raises(UnansweredError, match="No module named 'nowhere'"):
        in_child("nowhere", "nothing")
    assert in_child("math", "hypot", [3, 4]) == 5
    assert run_command("sleep", "60", seconds=0.5)[0] == 124
    assert run_command("no-such-command")[::2] == (127, "no-such-command: No such file or directory")


# ---- Python and packages


def test_a_python_that_is_too_old_is_missing():
    assert only(doctor_machine.python(">=3.11")).level == "OK"
    assert "needs >=3.99" in only(doctor_machine.python(">=3.99")).found


def test_an_extra_that_is_absent_is_well_unless_the_configuration_wants_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_machine, "version", refuse_deepspeed(doctor_machine.version))
    assert named("extra deepspeed", doctor_machine.packages()).level == "OK"
    wanted = named("extra deepspeed", doctor_machine.packages(frozenset({"deepspeed"})))
    assert (wanted.level, wanted.fix) == ("MISS", "pip install 'spire-dist[deepspeed]'")


def refuse_deepspeed(version: Callable[[str], str]) -> Callable[[str], str]:
    def without(name: str) -> str:
        if name == "deepspeed":
            raise doctor_machine.PackageNotFoundError(name)
        return version(name)

    return without


def test_another_distribution_with_files_in_our_package_is_named(tmp_path: Path):
    other = tmp_path / "cluster-1.4.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cluster\nVersion: 1.4.1\n")
    (other / "top_level.txt").write_text("cluster\n")
    code = "from cluster.doctor_machine import own_packages; print(own_packages()[0])"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout
    assert "level='MISS'" in out
    assert "the installed cluster calls itself `cluster` too" in out


# ---- GPUs

CPU = {"torch": "2.13.0+cpu", "cuda": None, "gpus": []}
CUDA = {"torch": "2.13.0", "cuda": "12.8", "nccl": "2.27.3"}
H100 = {"name": "NVIDIA H100, 80 GiB", "uuid": "a"}


@pytest.mark.parametrize(
    ("facts", "machine", "environment", "wanted", "level", "words"),
    [
        (CPU, 0, {}, False, "OK", "none here; torch 2.13.0+cpu is a CPU build"),
        (CPU, 2, {}, False, "MISS", "is a CPU build, but this machine has 2"),
        (CPU, 0, {}, True, "MISS", "device = 'cuda' is asked for"),
        (CPU, 0, {"SLURM_JOB_GPUS": "0,1"}, False, "MISS", "but Slurm gave 0,1"),
        (CUDA | {"gpus": [H100, H100]}, 2, {}, True, "OK", "2 × NVIDIA H100, 80 GiB (CUDA 12.8)"),
        (CUDA | {"gpus": [H100]}, 2, {"CUDA_VISIBLE_DEVICES": "0,7"}, True, "WARN", "names more"),
        (CUDA | {"gpus": []}, 2, {"CUDA_VISIBLE_DEVICES": ""}, True, "MISS", "shows none, but this machine has 2"),
        (CUDA | {"gpus": [], "error": "driver too old"}, 2, {}, False, "MISS", "(driver too old)"),
        (CUDA | {"gpus": []}, 0, {}, True, "WARN", "a login node?"),
        (CUDA | {"gpus": []}, 0, {"SLURM_JOB_ID": "1"}, True, "MISS", "sees none"),
        ({"failed": "ImportError: libcudart.so.12"}, 0, {}, False, "MISS", "libcudart.so.12"),
    ],
)
def test_gpus_that_are_there_or_wanted_must_be_seen(facts, machine, environment, wanted, level, words):
    check = doctor_machine.gpus(facts, machine, environment, wanted)[0]
    assert (check.level, bool(check.fix)) == (level, level != "OK")
    assert words in check.found


def test_a_torch_without_nccl_is_a_drawback():
    facts = {"torch": "2.13.0", "cuda": "12.8", "gpus": [H100]}
    assert named("NCCL", doctor_machine.gpus(facts, 1, {}, True)).level == "WARN"


def test_few_open_files_and_little_shared_memory_are_drawbacks():
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (256, 256)); from cluster import doctor_machine as d; "
        "d.SHARED_MEMORY_GIB = 1e9; print([check.level for check in d.limits(False)])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['WARN', 'WARN']"


# ---- file systems, ports, names


def test_a_file_in_place_of_the_run_is_missing(tmp_path: Path):
    (tmp_path / "run").write_text("")
    assert only(doctor_places.file_system(tmp_path / "run", 1)).found == f"{tmp_path / 'run'} is a file"


def test_writing_that_fails_in_the_middle_says_what_failed_and_keeps_no_file(tmp_path: Path):
    code = (
        "import resource as r, sys; from cluster.doctor_places import try_folder; "
        "r.setrlimit(r.RLIMIT_FSIZE, (4096, 4096)); print(try_folder(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "probe")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "{'error': 'File too large (writing)'}"
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_told_by_how_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, level in (("FREE_GIB", "WARN"), ("LEAST_FREE_GIB", "MISS")):
        monkeypatch.setattr(doctor_places, name, 1e9)
        assert named("free space", doctor_places.file_system(tmp_path, 1)).level == level


@pytest.mark.parametrize(
    ("kind", "nodes", "level"),
    [
        ("ext4", 1, "OK"),
        ("ext4", 2, "WARN"),
        ("ext4", None, "OK"),
        ("nfs4", 2, "OK"),
        ("lustre", 2, "OK"),
        ("tmpfs", 1, "WARN"),
    ],
)
def test_a_disk_of_one_machine_is_a_doubt_for_several_nodes(tmp_path: Path, kind: str, nodes: int | None, level: str):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "20 1 254:0 / / rw - overlay none rw\n"
        f"21 20 0:5 / {tmp_path} rw,relatime shared:1 - {kind} server:/x rw,local_lock=none\n"
    )
    check = named("file system", doctor_places.file_system(tmp_path / "run", nodes, mounts))
    assert check.level == level
    assert check.found.startswith(f"{tmp_path}: {kind}")


def test_mounts_are_read_as_the_kernel_writes_them(tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text("20 1 8:1 / / rw - ext4 /dev/sda rw\n21 20 0:5 / /my\\040data rw - nfs4 s:/x rw,local_lock=all\n")
    assert doctor_places.mount_of(Path("/my data/run"), mounts) == ("nfs4", "rw,s:/x rw,local_lock=all")
    assert doctor_places.mount_of(Path("/my"), mounts)[0] == "ext4"
    own = doctor_places.mount_of(Path("/proc/self"), Path("/proc/self/mountinfo"))
    assert own[0] == "proc"


def test_locks_within_a_machine_only_are_a_drawback(tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text("20 1 8:1 / / rw - lustre s:/x rw,localflock\n")
    check = named("file locks", doctor_places.file_system(tmp_path, 2, mounts))
    assert (check.level, check.found) == ("WARN", "only within a machine (mounted with localflock)")


def test_the_port_of_a_job_must_be_free():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = only(doctor_places.ports({"SLURM_JOB_ID": "42", "MASTER_PORT": str(port)}))
        assert (check.level, check.found) == ("MISS", f"{port}, of this job, is taken")
    assert only(doctor_places.ports({"SLURM_JOB_ID": "42", "MASTER_PORT": str(port)})).level == "OK"


def test_ports_are_those_at_which_ranks_meet(monkeypatch: pytest.MonkeyPatch):
    from spire_dist.distributed.mesh import PORTS

    assert doctor_places.PORTS == PORTS
    monkeypatch.setattr(doctor_places, "_is_free", lambda port: port % 500 == 0)
    assert only(doctor_places.ports({})).level == "WARN"
    monkeypatch.setattr(doctor_places, "_is_free", lambda port: False)
    assert only(doctor_places.ports({})).level == "MISS"


def test_names_that_do_not_resolve_and_wrong_interfaces_are_told(monkeypatch: pytest.MonkeyPatch):
    own = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert [doctor_places.names({}, nodes)[0].level for nodes in (1, 2)] == ["WARN", "MISS"]
    monkeypatch.setattr(socket, "gethostname", lambda: own if own == "localhost" else "localhost")
    address = named("own address", doctor_places.names({}, 2))
    assert "127.0.0.1, which other nodes cannot reach" in address.found
    assert "GLOO_SOCKET_IFNAME=" in address.fix
    wrong = named("interface", doctor_places.names({"GLOO_SOCKET_IFNAME": "ib7"}, 2))
    assert wrong.level == "MISS"
    assert re.search(r"ib7 is not one of .*\blo\b", wrong.found)


def test_a_slow_resolver_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_places, "SLOW_NAME_S", 0.2)
    monkeypatch.setattr(socket, "gethostbyaddr", lambda address: time.sleep(0.3))
    check = named("own name", doctor_places.names({}, 1))
    assert (check.level, "resolv.conf" in check.fix) == ("WARN", True)


# ---- Slurm


def test_no_slurm_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_slurm.slurm({}, None) == [Check("Slurm", "OK", "not on a Slurm machine")]


def test_a_controller_that_is_down_and_munge_without_its_daemon_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which("munge") is None or shutil.which("scontrol") is None:
        pytest.skip("needs munge and Slurm's commands: apt-get install munge slurm-client")
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        f"ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={free_port()}\n"
        f"AuthInfo=socket={tmp_path}/munge.sock\nMessageTimeout=2\nNodeName=n1\nPartitionName=main Nodes=n1\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    found = {check.name: check for check in doctor_slurm.slurm({}, None)}
    assert found["Slurm commands"].level == "OK"
    assert found["Slurm controller"].level == "MISS"
    if not Path("/run/munge/munge.socket.2").exists():
        assert found["munge"].level == "MISS"
        assert "munged" in found["munge"].fix


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_slurm_without_its_commands_on_compute_nodes_cannot_queue_a_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in doctor_slurm.slurm({"SLURM_JOB_ID": "4711"}, None)}
    assert found["Slurm commands"].level == "WARN"
    assert found["time limit"].level == "WARN"
    assert "submit again by hand" in found["time limit"].fix


def test_an_exit_code_may_queue_a_run_again():
    assert doctor_slurm.requeue_codes("1-3,75") == {1, 2, 3, 75}
    assert doctor_slurm.when_time_is_up({"RequeueExit": "70-80"}, scontrol=False, inside=True).level == "OK"
    assert doctor_slurm.when_time_is_up({"RequeueExit": "(null)"}, scontrol=False, inside=True).level == "WARN"


@pytest.mark.parametrize(
    ("settings", "partition", "level", "words"),
    [
        ({"PreemptType": "preempt/none"}, {}, "OK", "never"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "OFF"}, {}, "OK", "never"),
        (
            {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE", "KillWait": "30 sec"},
            {"GraceTime": "120"},
            "OK",
            "150 s",
        ),
        ({"PreemptType": "preempt/qos", "KillWait": "5 sec"}, {"PreemptMode": "REQUEUE"}, "WARN", "5 s to save"),
        ({"PreemptType": "preempt/qos"}, {"PreemptMode": "CANCEL", "GraceTime": "60"}, "WARN", "cancelled for good"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "GANG,SUSPEND"}, {}, "WARN", "stands still"),
    ],
)
def test_what_a_preemption_does_is_told(settings, partition, level, words):
    check = doctor_slurm.when_preempted(settings, partition)
    assert check.level == level
    assert words in check.found


def test_a_site_that_never_notices_a_lost_node_is_told():
    assert doctor_slurm.when_a_node_is_lost({"SlurmdTimeout": "300 sec"}).level == "OK"
    assert doctor_slurm.when_a_node_is_lost({"SlurmdTimeout": "0 sec"}).level == "WARN"


# ---- configuration and store


def test_a_store_that_fits_is_well_and_ranks_must_be_divisible(tiny_settings: list[str]):
    config = load_config(overrides=tiny_settings)
    assert "kept in memory" in named("store", check_config(config)).found
    uneven = load_config(overrides=[*tiny_settings, "parallel.gauss=2", "job.nodes=3"])
    check = named("configuration", check_config(uneven))
    assert (check.level, check.fix) == ("MISS", "choose a parallel.gauss that divides 3")


def test_a_store_that_is_not_there_is_missing(tmp_path: Path):
    config = load_config(overrides=[f"data.store='{tmp_path}/nothing.zarr'"])
    check = named("store", check_config(config))
    assert check.level == "MISS"
    assert "nothing.zarr" in check.found


def write_command(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
