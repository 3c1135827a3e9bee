"""slurm/train.sh under stand-ins for srun and scontrol."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sh"


def run_script(folder: Path, *arguments: str, srun_code: int = 0) -> tuple[int, list[str]]:
    """Exit code of train.sh, and the Slurm commands it called, one argument per `|`."""
    calls = folder / "calls"
    calls.touch()
    for name, code in (("srun", srun_code), ("scontrol", 0)):
        command = folder / name
        command.write_text(f'#!/bin/bash\n(IFS="|"; echo "{name}|$*" >> "{calls}")\nexit {code}\n')
        command.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, check=False)
    return result.returncode, calls.read_text().splitlines()


def test_script_is_short_and_parses():
    assert len(SCRIPT.read_text().splitlines()) <= 40
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_arguments_reach_the_program_unbroken(tmp_path: Path):
    code, calls = run_script(tmp_path, "my config.toml", "runs/a b")
    assert code == 0
    assert calls == ["srun|--kill-on-bad-exit=1|spire-dist|train|my config.toml|--run|runs/a b"]


def test_saved_and_left_early_queues_the_job_again(tmp_path: Path):
    code, calls = run_script(tmp_path, "c.toml", "run", srun_code=75)
    assert (code, calls[1:]) == (75, ["scontrol|requeue|4711"])


@pytest.mark.parametrize("srun_code", [0, 1, 2, 137, 143])
def test_any_other_end_is_the_end(tmp_path: Path, srun_code: int):
    code, calls = run_script(tmp_path, "c.toml", "run", srun_code=srun_code)
    assert (code, len(calls)) == (srun_code, 1)


@pytest.mark.parametrize("arguments", [(), ("c.toml",), ("c.toml", "run", "more")])
def test_wrong_number_of_arguments_runs_nothing(tmp_path: Path, arguments: tuple[str, ...]):
    assert run_script(tmp_path, *arguments) == (2, [])


def test_notice_reaches_the_task_in_time_to_save():
    from cluster.submit import SIGNAL_DELAY_S

    [notice] = re.findall(r"^#SBATCH --signal=(.*)$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert notice == f"TERM@{SIGNAL_DELAY_S}", "B: would send it to the shell, which does not pass it on"
