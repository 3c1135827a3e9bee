"""Trials of a sweep as Ray Tune sees them: an actor that starts their processes, who stops early, and what is told.

What a trial has reached lies on the shared disk (`trial_process.py`), and Ray's checkpoints are pointers to it; so a trial that
Ray lost track of goes on from there all the same. Called by `sweep.py`. Ray must be installed.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler

from cluster.sweep_files import CONFIG, LOG, ORIGIN, PARENT, STOP, read_reports, read_sweep, trial_folder, write_reports
from cluster.sweep_space import Settings, Space
from spire_dist.config import dump_config
from spire_dist.errors import SpireError
from spire_dist.files import remove, write_durably, write_json

PERMILLE = "permille"
"""What Ray takes for time: thousandths of the training."""
POINTER = "pointer.json"
KEPT = 2
"""Reports of a population's trial whose checkpoint is kept for others."""


def number_of(trial_id: str) -> int:
    """Which of the drawn configurations a trial is: Ray counts them."""
    return int(trial_id.rpartition("_")[2])


def folder_name(trial: TuneTrial) -> str:
    """Ray's own folder of a trial; by default it would hold all settings in its name."""
    return trial.trial_id


class Trial(tune.Trainable):
    """One trial; a step leads from one report to the next."""

    def setup(self, config: dict[str, Any]) -> None:
        """Make the run directory, where there is none: the directory knows better than Ray what its settings are."""
        self.out = Path(config["out"])
        self.number = number_of(self.trial_id)
        self.run_folder = trial_folder(self.out, self.number)
        self.settings: Settings = config["settings"]
        self.space = Space.from_dict(read_sweep(self.out))
        self.reported = 0
        if not (self.run_folder / CONFIG).exists():
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._begin_with(self.settings, None)
        # The command's own code, where this node sees it (its compiled kernels lie beside it), else what Ray sent.
        code = Path(config["code"])
        roots = [str(code)] if (code / "cluster" / "trial.py").exists() else []
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([*roots, *sys.path])}
        self.environment[PARENT] = str(os.getpid())
        self.environment.pop("SLURM_STEP_ID", None)  # the trial is no task of the job that Ray runs in

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Be another trial from now on, or the same one under other settings."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next report. Raises RuntimeError where the processes die again and again, or were stopped."""
        sweep, found = self.space.sweep, read_reports(self.run_folder)
        share = sweep.shares()[self.reported]
        if len(found) <= self.reported:
            if self.reported == 0 and sweep.budget is not None and spent(self.out) >= sweep.budget:
                return {PERMILLE: 0, sweep.metric: sweep.worst, "done": True}
            command = [sys.executable, "-m", "cluster.trial_process", str(self.out), str(self.number), str(share)]
            code = subprocess.run(command, env=self.environment, check=False).returncode
            self._stay_while_stopping()
            found = read_reports(self.run_folder)
            if code == SpireError.exit_code:  # such as a loss that is no number: so the settings are bad
                found.append({"share": share, "failed": last_words(self.run_folder / LOG), "settings": self.settings})
                write_reports(self.run_folder, found)
            elif code != 0 or len(found) <= self.reported:
                raise RuntimeError(f"{self.run_folder}: ended with exit code {code}; {LOG} there says why")
        report = found[self.reported]
        self.reported += 1
        if sweep.search == "pbt" and "failed" not in report:
            self._keep_for_others()
        end = share == 1 or "failed" in report
        return {PERMILLE: 1000 * share, sweep.metric: report.get(sweep.metric, sweep.worst), "done": end}

    def _stay_while_stopping(self) -> None:
        """When the whole sweep stops, Ray is to keep this trial as one that runs, and not as one that failed."""
        while (self.out / STOP).exists():
            time.sleep(0.2)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer: the checkpoint itself is in the run directory."""
        write_json(Path(checkpoint_dir) / POINTER, {"number": self.number, "reported": self.reported})

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:  # type: ignore[override]
        """Go on after a report, of another trial where a population decided so."""
        assert checkpoint_dir is not None
        pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())
        self.reported = pointer["reported"]
        if pointer["number"] != self.number:
            self._go_on_from(pointer["number"])

    def _begin_with(self, settings: Settings, parent: int | None) -> None:
        config = self.space.trial_config(self.out, settings)
        write_json(self.run_folder / ORIGIN, {"settings": settings} | ({} if parent is None else {"parent": parent}))
        write_durably(self.run_folder / CONFIG, dump_config(config))

    def _keep_for_others(self) -> None:
        """Link the newest checkpoint, which training will drop, into reports/K."""
        name, kept = (self.run_folder / "latest").read_text().strip(), self.run_folder / "reports"
        if not (kept / str(self.reported)).exists():
            linked(self.run_folder / "checkpoints" / name, kept / f".{self.reported}" / name)
            (kept / f".{self.reported}").rename(kept / str(self.reported))
        for old in range(self.reported - KEPT + 1):
            remove(kept / str(old))

    def _go_on_from(self, other: int) -> None:
        """Take over another trial's state as of the same report, under the settings that Ray gave this trial."""
        theirs, own = trial_folder(self.out, other), self.run_folder
        [checkpoint] = (theirs / "reports" / str(self.reported)).iterdir()
        (own / "latest").unlink(missing_ok=True)
        for name in ("checkpoints", "stage1", "latents.npy", "parts.npy", "config.toml"):
            remove(own / name)
        linked(checkpoint, own / "checkpoints" / checkpoint.name)
        if (theirs / "stage1").exists():
            linked(theirs / "stage1", own / "stage1")
        self._begin_with(self.settings, other)
        shutil.copyfile(own / CONFIG, own / "config.toml")
        write_reports(own, read_reports(own)[: self.reported])
        write_durably(own / "latest", f"{checkpoint.name}\n")


class Halving(ASHAScheduler):
    """ASHA, which keeps no record of its rungs when a sweep is restored; here it is read from the trials' reports."""

    def __init__(self, out: Path, metric: str, mode: str, grace: float, reduction: float) -> None:
        super().__init__(PERMILLE, metric, mode, max_t=1000, grace_period=1000 * grace, reduction_factor=reduction)  # type: ignore[arg-type]
        self.out = out

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Know of a trial, and of what it reported in an earlier life of the sweep."""
        super().on_trial_add(tune_controller, trial)
        known = (trial.last_result or {}).get(PERMILLE, 0)
        for report in read_reports(trial_folder(self.out, number_of(trial.trial_id))):
            if self.metric in report and 1000 * report["share"] <= known:
                self.on_trial_result(
                    tune_controller, trial, {PERMILLE: 1000 * report["share"], self.metric: report[self.metric]}
                )


@dataclass
class Explore:
    """New settings for a trial that goes on from another one's state; called by Ray with that one's configuration."""

    space: Space
    calls: int = 0

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with settings near by."""
        self.calls += 1
        return config | {"settings": self.space.perturbed(config["settings"], self.calls)}


@dataclass
class Progress(tune.Callback):
    """A line for each report."""

    metric: str
    mode: str
    out: Path
    best: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By thousandths of the training: the best value there, and whose it is."""

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict, **info: Any
    ) -> None:
        """See Ray."""
        number, share, value = number_of(trial.trial_id), result[PERMILLE], result[self.metric]
        if share == 0:
            print(f"trial {number:3}: not begun, the budget is used up", flush=True)
            return
        found = read_reports(trial_folder(self.out, number))
        if found and "failed" in found[-1]:
            print(f"trial {number:3}: failed: {found[-1]['failed']}", flush=True)
            return
        here = self.best.get(round(share), (value, number))
        self.best[round(share)] = here = (min if self.mode == "min" else max)(here, (value, number))
        print(
            f"trial {number:3}: {share / 10:3.0f} % of the training, {self.metric} {value:.6f}; "
            f"best there: {here[0]:.6f} (trial {here[1]})",
            flush=True,
        )

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """See Ray."""
        number = number_of(trial.trial_id)
        print(f"trial {number:3}: crashed; {trial_folder(self.out, number) / LOG} says why", flush=True)


def spent(out: Path) -> float:
    """Whole trainings' worth of steps that all trials together have made."""
    return sum(reports[-1]["share"] for run in (out / "trials").iterdir() if (reports := read_reports(run)))


def last_words(log: Path) -> str:
    """The last line a trial's process said as an error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("spire-dist: ")]
    return lines[-1].removeprefix("spire-dist: ") if lines else f"see {log}"


def linked(source: Path, target: Path) -> None:
    """A copy of a folder of files that nobody changes: links, where the file system has them."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)

    remove(target)
    shutil.copytree(source, target, copy_function=link)
