"""Cores and ranks, on systems that tell them in different ways."""

import os

import psutil
import pytest

from spire_dist import machine
from spire_dist.machine import cores, local_ranks, own_cores


def test_only_the_cores_this_process_may_use_are_counted():
    own = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else range(psutil.cpu_count() or 1)
    assert cores() == len(own)


@pytest.mark.parametrize("count", [None, 6])
def test_a_system_that_limits_no_process_has_all_its_cores(monkeypatch, count):
    for name in ("process_cpu_count", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cores() == (count or 1)


def test_a_newer_python_is_asked_first(monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert cores() == 3


def test_a_process_that_no_launcher_started_is_alone_on_its_node(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_ranks() == 4


def test_a_rank_has_what_slurm_gave_its_task_else_an_equal_share(monkeypatch):
    for name in ("SLURM_STEP_ID", "SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert own_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert own_cores() == 2
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert own_cores() == 6
