"""What a sweep keeps in its folder, and who writes it.

sweep.json            what is searched and how (the command, once)      training.zarr   the particles that trials train on
trials/0007/          a run directory, and in it:                        ray/            what Ray keeps for itself
    trial.toml        its configuration (the actor)                     stop            there while all trials are to stop
    origin.json       its settings now, and whom it goes on from        results.csv  sweep.png  best.toml   at the end
    reports.jsonl     a line for each report (the trial's process)
    starts.jsonl      a line for each process that began
    reports/2/        of a population: the checkpoint of its second report, for others to go on from
"""

import fcntl
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from spire_dist.distributed.holder import LOCK
from spire_dist.files import write_durably, write_json

CONFIG, LOG, ORIGIN, REPORTS, STARTS, STOP, SWEEP, VIEW, RAY = (
    "trial.toml", "train.log", "origin.json", "reports.jsonl", "starts.jsonl", "stop", "sweep.json", "training.zarr", "ray",
)  # fmt: skip
PARENT = "SPIRE_TRIAL_PARENT"
"""Variable: the process that a trial is not to outlive."""
Report = dict[str, Any]
"""share (of the training), loss or auc, steps, train_s, look_s (seconds), time, settings, parent; or failed: why."""


def trial_folder(out: Path, number: int) -> Path:
    """The run directory of a trial."""
    return out / "trials" / f"{number:04d}"


def write_sweep(out: Path, content: dict[str, Any]) -> None:
    """Make the folder of a sweep."""
    (out / "trials").mkdir(parents=True, exist_ok=True)
    write_json(out / SWEEP, content)


def read_sweep(out: Path) -> dict[str, Any]:
    """What `write_sweep` wrote."""
    return json.loads((out / SWEEP).read_text())


def read_lines(path: Path) -> list[Report]:
    """Records of a file of JSON lines, none where it is not there; one cut short by a crash does not count."""
    found = []
    with suppress(OSError, json.JSONDecodeError):
        found.extend(json.loads(line) for line in path.read_text().splitlines())
    return found


def read_reports(run: Path) -> list[Report]:
    """What a trial has reported so far."""
    return read_lines(run / REPORTS)


def write_reports(run: Path, reports: list[Report]) -> None:
    """Replace them; afterwards they are on the disk."""
    write_durably(run / REPORTS, "".join(json.dumps(report) + "\n" for report in reports))


def held(run: Path) -> bool:
    """Whether a process trains in a run directory."""
    try:
        with open(run / LOCK, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing it lets it go
    except BlockingIOError:
        return True
    except OSError:  # no such folder yet, or a file system without locks
        pass
    return False
