"""What becomes of a job when a rank has ended: decisions, with a stand-in for scontrol (test_slurm_runs.py: a real one)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.entry import Ending, _decide, _decides, _ending, run_rank
from cluster.lives import read_lives

CRASH = Ending(137, "rank 1 was ended by SIGKILL", again=True)
STOPPED = Ending(75, "stopped on request and saved", again=True)


class Slurm:
    """Says what it is told to say, and keeps what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "bin").mkdir()
        (self.run / "jobs").mkdir(parents=True)
        self.says("RUNNING", 0)

    def says(self, state: str, restarts: int, refuses: str = "") -> None:
        answer = f"echo '{refuses}' >&2; exit 1" if refuses else f"echo $2 >> {self.folder}/requeued"
        shown = f"JobId=4711 JobState={state} Restarts={restarts} Command=/x y=z"
        script = f"#!/bin/bash\ncase $1 in requeue) {answer};; *) echo '{shown}';; esac\n"
        (self.folder / "bin" / "scontrol").write_text(script)
        (self.folder / "bin" / "scontrol").chmod(0o755)

    @property
    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def decide(self, ending: Ending, requeues: int = 100) -> int:
        return _decide(self.run, ending, requeues, Path("my.toml"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    found = Slurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"JOB_ID": "4711", "PROCID": "0", "NTASKS": "1", "STEP_NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return found


def test_a_stop_queues_the_job_again_and_is_noted(slurm: Slurm):
    assert slurm.decide(STOPPED) == 75
    assert slurm.requeued == 1
    [record] = read_lives(slurm.run)
    assert (record["job"], record["event"], record["code"], record["then"]) == ("4711", "ended", 75, "requeued")


@pytest.mark.parametrize(("code", "why"), [(0, "all is done"), (2, "a mistake")])
def test_what_is_done_or_wrong_is_not_queued_again(slurm: Slurm, code: int, why: str):
    assert slurm.decide(Ending(code, why, again=False)) == code
    assert slurm.requeued == 0


def test_three_crashes_without_a_save_between_them_are_the_end(slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    for number in range(2):
        (slurm.run / "latest").write_text(f"step-{number:08d}\n")
        assert slurm.decide(CRASH) == 75
    assert slurm.decide(CRASH) == 75  # the second one at this save
    assert slurm.decide(CRASH) == 1
    assert slurm.requeued == 3
    told = capsys.readouterr().err
    assert "not queued again: 3 crashes without a save between them" in told
    assert "spire-dist submit my.toml --run" in told


def test_stops_are_no_crashes(slurm: Slurm):
    for _ in range(5):
        assert slurm.decide(STOPPED) == 75
    assert slurm.decide(CRASH) == 75


def test_requeues_are_counted_for_the_job(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    assert [slurm.decide(STOPPED, requeues=2) for _ in range(3)] == [75, 75, 1]
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert slurm.decide(STOPPED, requeues=2) == 75  # submitted anew


@pytest.mark.parametrize(("state", "restarts"), [("CANCELLED", 0), ("COMPLETING", 0), ("RUNNING", 1)])
def test_a_job_that_slurm_ends_or_has_started_anew_is_left_alone(slurm: Slurm, state: str, restarts: int):
    slurm.says(state, restarts)
    assert slurm.decide(STOPPED) == 75
    assert slurm.requeued == 0
    assert "Slurm has ended" in read_lives(slurm.run)[-1]["then"]


def test_a_refusal_ends_with_1_and_says_how_to_go_on(slurm: Slurm, capsys: pytest.CaptureFixture[str]):
    slurm.says("RUNNING", 0, refuses="Requested operation is presently disabled")
    assert slurm.decide(STOPPED) == 1
    assert (
        "Slurm refuses: Requested operation is presently disabled. To go on: spire-dist submit"
        in capsys.readouterr().err
    )


def test_without_scontrol_exit_code_75_asks(slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PATH", str(slurm.folder))
    assert slurm.decide(CRASH) == 75
    assert "scontrol is not on this node" in capsys.readouterr().err


def test_one_task_of_a_life_decides(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    jobs = slurm.run / "jobs"
    assert [_decides(jobs, at_once=True) for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert _decides(jobs, at_once=True)


@pytest.mark.parametrize(
    ("code", "received", "found"),
    [
        (0, [], (0, False)), (2, [], (2, False)), (75, [15], (75, True)), (69, [], (69, True)), (1, [], (1, True)),
        (-9, [], (137, True)), (-15, [15], (75, True)), (-15, [], (143, True)),
    ],
)  # fmt: skip
def test_how_a_rank_ended(slurm: Slurm, code: int, received: list[int], found: tuple[int, bool]):
    class Noted:
        pass

    noted = Noted()
    noted.received = received  # type: ignore[attr-defined]
    ending = _ending(code, noted)  # type: ignore[arg-type]
    assert (ending.code, ending.again) == found


def test_a_mistake_is_told_before_anything_is_begun(slurm: Slurm, tmp_path: Path):
    (tmp_path / "c.toml").write_text("stage9 = 1\n")
    command = [sys.executable, "-m", "cluster.entry", str(tmp_path / "c.toml"), str(slurm.run)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"spire-dist: {tmp_path}/c.toml: unknown key 'stage9'")
    assert len(result.stderr.splitlines()) == 1
    assert read_lives(slurm.run) == []


def test_a_node_that_does_not_see_the_run_says_so(slurm: Slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr("cluster.entry.SEEN_WITHIN_S", 0.3)
    monkeypatch.setattr("cluster.entry.FIRST_DECIDES_S", 0.1)
    (tmp_path / "c.toml").write_text("")
    handlers = [signal.getsignal(number) for number in (2, 12, 15)]
    try:
        assert run_rank(tmp_path / "c.toml", slurm.run) == 2
    finally:
        for number, handler in zip((2, 12, 15), handlers, strict=True):
            signal.signal(number, handler)
    assert "does not see what localhost wrote there" in capsys.readouterr().err


def test_lines_that_are_being_written_are_left_out(slurm: Slurm):
    good = json.dumps({"job": "1", "event": "started"})
    (slurm.run / "jobs" / "lives.jsonl").write_text(f'{good}\n{{"job": "1", "ev')
    assert read_lives(slurm.run) == [json.loads(good)]
