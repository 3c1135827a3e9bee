"""`spire-dist status` on terminals and in files, beside real runs that are stopped and killed, and a real queue."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.text import Text

from cluster.run_states import RunState, read_state, read_states
from cluster.status import shortened, table
from tests.cluster.made_runs import NOW, beat, line, make_run, ranks, write, write_lines
from tests.cluster.trained import ENDLESS, kill, training, trains, wait_for

STATUS = [sys.executable, "-m", "spire_dist.cli", "status"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_table_of_a_file_and_the_lines_below_it(run):
    ranks(run)
    beat(run, 2, age=25, world=3)
    write_lines(run / "metrics.jsonl", [line(age=24)])
    head, row, empty, alarm = table([read_state(run, NOW)]).splitlines()
    assert head.split("  ")[0] == "run"
    assert row.split()[:5] == ["run", "STUCK", "1", "120/1000", "1.2"]
    assert empty == ""
    assert alarm.startswith("run: rank 2 on n3")


def test_the_command_refuses_a_folder_without_runs_in_one_line(tmp_path):
    told = subprocess.run([*STATUS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)


def on_terminal(command: list[str], columns: int, enough: Callable[[str], bool]) -> tuple[str, int]:
    """(what a command wrote on a terminal of so many columns, its exit code); Ctrl-C is typed once `enough` is there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"}, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    seen, asked = b"", False
    with contextlib.suppress(OSError):  # the terminal is gone with its process
        while piece := os.read(ours, 4096):
            seen += piece
            if not asked and enough(seen.decode(errors="ignore")):
                asked = True
                os.write(ours, b"\x03")
    os.close(ours)
    return seen.decode(), process.wait(30)


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_the_table_is_drawn_in_place_until_ctrl_c(run, columns):
    run = run.rename(run.with_name("a-rather-long-name-of-a-run-that-somebody-has-given"))
    seen, code = on_terminal(
        [*STATUS, "--watch", "--seconds", "0.2", str(run)], columns, lambda text: text.count("Ctrl-C") > 2
    )
    assert code == 0
    assert "\x1b[?1049h" in seen  # another screen, left at the end
    assert "\x1b[?1049l" in seen
    last = seen.split("\x1b[?1049l")[-1]
    rows = [row for row in plain(last).splitlines() if row]
    assert max(map(len, rows)) <= columns
    assert any("no sign of life" in row and "120/1000" in row for row in rows)
    assert ("elapsed" in rows[0]) == (columns == 140)


def plain(text: str) -> str:
    return Text.from_ansi(text.replace("\r", "")).plain


def test_without_a_terminal_a_table_comes_at_every_interval_until_ctrl_c(run):
    process = subprocess.Popen([*STATUS, "--watch", "--seconds", "0.2", str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    heads = [next(row for row in process.stdout if row.startswith("run  ")) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert len(heads) == 3


@pytest.mark.parametrize(("text", "expected"), [("runs/a", "runs/a"), ("trials/0000001", "…s/0000001")])
def test_a_long_path_loses_its_beginning(text, expected):
    assert shortened(text, 10) == expected


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_settings: list[str]) -> Iterator[Path]:
    """Three runs that train: `pair` of two ranks and `lone` without end, and `short`, which ends by itself."""
    folder = tmp_path_factory.mktemp("runs")
    endless = [*tiny_settings, *ENDLESS]
    with training(folder, {"pair": (2, endless), "lone": (1, endless), "short": (1, tiny_settings)}):
        yield folder


@pytest.mark.slow
def test_real_runs_that_train_end_hang_and_die(live):
    pair = wait_for(live / "pair", trains, 300)
    lone = wait_for(live / "lone", trains, 300)
    assert (len(pair.ranks), len(lone.ranks), pair.stage, lone.eta_rough) == (2, 1, 1, True)
    assert pair.total == lone.total == 800_000
    assert pair.ranks[1].pid is not None
    assert lone.ranks[0].pid is not None
    assert not [alarm for alarm in pair.alarms if alarm.kind == "stuck"]
    os.kill(pair.ranks[1].pid, signal.SIGSTOP)
    kill(lone.ranks[0].pid)
    stuck = wait_for(live / "pair", lambda state: state.state == "STUCK", 30)
    alarm = next(alarm for alarm in stuck.alarms if alarm.kind == "stuck")
    assert (alarm.rank, f"rank 1 on {stuck.ranks[1].host}" in alarm.text) == (1, True)
    dead = wait_for(live / "lone", lambda state: state.state == "no sign of life", 30)
    assert "all ranks" in dead.alarms[0].text
    os.kill(pair.ranks[1].pid, signal.SIGCONT)
    wait_for(live / "pair", lambda state: state.state == "training", 30)
    short = wait_for(live / "short", lambda state: state.state == "complete", 300)
    assert (short.stage, short.step, short.total, short.beat_age_s, short.alarms) == (2, 24, 24, None, ())
    told = subprocess.run([*STATUS, "--json", str(live)], capture_output=True, text=True, check=True).stdout
    assert {run["name"]: run["state"] for run in json.loads(told)} == {
        "pair": "training", "lone": "no sign of life", "short": "complete",
    }  # fmt: skip


@pytest.mark.slow
def test_the_queue_is_asked_where_there_is_one(run, slurm):
    def job(state: str, queue: str) -> RunState:
        until = time.monotonic() + 60
        while (found := read_states([run])[0]).queue is None or not found.queue.startswith(queue):
            assert time.monotonic() < until, found
            time.sleep(0.2)
        assert found.state == state
        return found

    (run / "STATUS.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "ranks" / "beat-0000.json").unlink()
    sbatch = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "sleep 100"]
    number = subprocess.run(sbatch, capture_output=True, text=True, check=True).stdout.strip()
    write(run / "jobs" / "job.json", {"id": number, "cluster": "slurm", "time": time.time()})
    held = job("queued", "PENDING (JobHeldUser)")
    assert held.job == number
    write(run.parent / "lost" / "jobs" / "job.json", {"id": "999999", "cluster": "slurm", "time": time.time()})
    assert {state.name: state.queue for state in read_states([run.parent])} == {"run": held.queue, "lost": "gone"}
    assert "PENDING (JobHeldUser)" in table([held])
    subprocess.run(["scontrol", "release", number], check=True)
    job("starting", "RUNNING (")
    subprocess.run(["scancel", number], check=True)
    assert "left the queue" in job("no sign of life", "gone").alarms[0].text
