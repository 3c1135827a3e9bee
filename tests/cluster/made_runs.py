"""Run directories as `status` finds them, written without a run; all of it at the moment `NOW`."""

import json
import os
import time
from pathlib import Path
from typing import Any

from cluster.run_states import RunState
from spire_dist.config import dump_config, load_config

NOW = 1_700_000_000.0
"""Long ago."""


def make_run(folder: Path) -> Path:
    """Files of a run of one rank that trains: 10 epochs of 100 steps of 64 images in stage 1, 20 epochs in stage 2."""
    overrides = [
        "stage1.epochs=10",
        "stage1.batch=64",
        "stage1.gaussians=100",
        "stage2.epochs=20",
        "stage2.gaussians=300",
    ]
    write(folder / "STATUS.json", said("training"))
    (folder / "config.toml").write_text(dump_config(load_config(overrides=[*overrides, "job.requeues=10"])))
    write_lines(folder / "metrics.jsonl", [line(110, 12), line(120, 2)])
    beat(folder)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def said(state: str, step: int = 100, stage: int = 1, age: float = 60.0, message: str = "") -> dict[str, Any]:
    when = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(NOW - age))
    return {"state": state, "stage": stage, "step": step, "time": when, "pid": 1, "message": message}


def line(step: int = 120, age: float = 2.0, stage: int = 1, total: int = 1000, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage, "step": step, "total": total, "epoch": step / 100, "loss": 1.0, "images_per_s": 640.0,
        "wait_share": 0.1, "collective_share": 0.2, "memory_gib": 1.5, "elapsed_s": 50.0, "left_s": 88.0, "time": NOW - age,
    } | more  # fmt: skip


def beat(run: Path, rank: int = 0, age: float = 1.0, seen: float | None = None, **more: Any) -> None:
    """A sign of life by a clock that says `age`, in a file that is `seen` seconds old."""
    path = run / "ranks" / f"beat-{rank:04d}.json"
    sign = {
        "time": NOW - age,
        "rank": rank,
        "world": 1,
        "stage": 1,
        "step": 120,
        "waiting": False,
        "host": f"n{rank + 1}",
    }
    write(path, sign | {"pid": 4000 + rank, "job": None, "restart": 0} | more)
    written = NOW - (max(age, 0.0) if seen is None else seen)
    os.utime(path, (written, written))


def ranks(run: Path, *, world: int = 3, **more: Any) -> None:
    for rank in range(world):
        beat(run, rank, world=world, waiting=rank != 1, **more)


def texts(state: RunState) -> list[str]:
    return [alarm.text for alarm in state.alarms]
