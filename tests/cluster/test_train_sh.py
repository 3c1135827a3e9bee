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
    code, [call] = run_script(tmp_path, "my config.toml", f"{tmp_path}/a b", "--set", "seed=1")
    assert code == 0
    assert call == (
        f"srun|--kill-on-bad-exit=1|--unbuffered|--open-mode=append|--output={tmp_path}/a b/jobs/%j_%t_log.out|"
        f"python|-m|cluster.entry|my config.toml|{tmp_path}/a b|--set|seed=1"
    )
    assert (tmp_path / "a b" / "jobs").is_dir()


@pytest.mark.parametrize("srun_code", [0, 1, 2, 75, 137])
def test_the_tasks_exit_code_is_the_jobs(tmp_path: Path, srun_code: int):
    code, calls = run_script(tmp_path, "c.toml", f"{tmp_path}/run", srun_code=srun_code)
    assert (code, len(calls)) == (srun_code, 1)


@pytest.mark.parametrize("arguments", [()])
def test_without_a_configuration_nothing_runs(tmp_path: Path, arguments: tuple[str, ...]):
    assert run_script(tmp_path, *arguments) == (2, [])


def test_notice_reaches_the_task_in_time_to_save():
    from cluster.submit import SIGNAL_DELAY_S

    [notice] = re.findall(r"^#SBATCH --signal=(.*)$", SCRIPT.read_text(), flags=re.MULTILINE)
    assert notice == f"USR2@{SIGNAL_DELAY_S}", "B: would send it to the shell, which does not pass it on"
