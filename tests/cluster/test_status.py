"""`spire-dist status`: what it makes of run directories, of real runs that are stopped and killed, and of damaged files."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.run_files import find_runs
from cluster.run_states import RunState, distinct_names, read_curves, read_state, read_states
from cluster.status import as_json, shortened, table
from spire_dist.config import dump_config, load_config
from spire_dist.errors import RunError

NOW = 1_700_000_000.0
"""Long ago."""
STATUS = [sys.executable, "-m", "spire_dist.cli", "status"]


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one rank that trains: 10 epochs of 100 steps of 64 images in stage 1, 20 epochs in stage 2."""
    overrides = [
        "stage1.epochs=10",
        "stage1.batch=64",
        "stage1.gaussians=100",
        "stage2.epochs=20",
        "stage2.gaussians=300",
    ]
    folder = tmp_path / "run"
    write(folder / "STATUS.json", said("training"))
    (folder / "config.toml").write_text(dump_config(load_config(overrides=[*overrides, "job.requeues=10"])))
    write_lines(folder / "metrics.jsonl", [line(110, 12), line(120, 2)])
    beat(folder)
    return folder


def ranks(run: Path, *, world: int = 3, **more: Any) -> None:
    for rank in range(world):
        beat(run, rank, world=world, waiting=rank != 1, **more)


def texts(state: RunState) -> list[str]:
    return [alarm.text for alarm in state.alarms]


# --- what a directory says -------------------------------------------------------------------------------------------


def test_a_run_that_trains(run):
    state = read_state(run, NOW)
    assert (state.name, state.state, state.stage, state.step, state.total) == ("run", "training", 1, 120, 1000)
    assert (state.epoch, state.loss, state.images_per_s, state.elapsed_s, state.restarts) == (1.2, 1.0, 640.0, 50.0, 0)
    assert state.beat_age_s == pytest.approx(1.0)
    assert state.alarms == ()
    rank = state.ranks[0]
    assert (len(state.ranks), rank.rank, rank.host, rank.pid, rank.waiting) == (1, 0, "n1", 4000, False)
    assert (rank.wait_share, rank.collective_share, rank.memory_gib) == (0.1, 0.2, 1.5)


def test_the_time_left_is_that_of_the_run_and_stage_2_is_guessed_from_its_gaussians(run):
    left_1 = 880 * 64 / 640 - 2
    left_2 = 20 * 6400 / 640 * 3
    state = read_state(run, NOW)
    assert (state.eta_s, state.eta_rough) == (pytest.approx(left_1 + left_2), True)
    write_lines(run / "metrics.jsonl", [line(500, 0, stage=2, total=2000)])
    state = read_state(run, NOW)
    assert (state.eta_s, state.eta_rough) == (pytest.approx(1500 * 64 / 640), False)


QUEUED, RUNS, GONE = "PENDING (Priority)", "RUNNING (n1)", "gone"


@pytest.mark.parametrize(
    ("status", "age", "queue", "expected"),
    [
        ("training", 1, None, "training"),
        ("training", -40, None, "training"),  # a clock that is ahead
        ("training", 100, None, "no sign of life"),
        ("training", 100, QUEUED, "queued"),  # its node died
        ("training", 100, RUNS, "no sign of life"),
        ("training", 1, RUNS, "training"),
        ("training", 100, "SUSPENDED (None)", "suspended"),
        ("stopped", None, None, "stopped"),
        ("stopped", None, QUEUED, "queued"),
        ("stopped", None, RUNS, "starting"),
        ("stopped", 1, None, "starting"),
        ("stopped", None, GONE, "stopped"),
        ("failed", 100, GONE, "failed"),
        ("failed", 100, QUEUED, "queued"),
        ("complete", None, GONE, "complete"),
        (None, None, QUEUED, "queued"),
        (None, None, None, "queued"),  # submitted, and nobody to ask
        (None, None, RUNS, "starting"),
        (None, None, GONE, "no sign of life"),
        (None, 1, RUNS, "starting"),
    ],
)
def test_state(run, status, age, queue, expected):
    write(run / "jobs" / "job.json", {"id": "4711", "cluster": "slurm", "time": NOW - 500})
    (run / "STATUS.json").unlink()
    (run / "ranks" / "beat-0000.json").unlink()
    if status is not None:
        write(run / "STATUS.json", said(status))
    if age is not None:
        beat(run, age=age, job="4711")
    state = read_state(run, NOW, None if queue is None else {"4711": queue})
    assert (state.state, state.job, state.queue) == (expected, "4711", queue)


def test_a_run_that_has_just_failed_does_not_start(run):
    """Its signs of life are still fresh, those of other ranks even newer."""
    beat(run, 0, age=3, world=2)
    beat(run, 1, age=0, world=2)
    write(run / "STATUS.json", said("failed", age=2))
    assert read_state(run, NOW).state == "failed"
    beat(run, 0, age=0, world=2)
    assert read_state(run, NOW).state == "starting"


def test_a_job_that_runs_is_at_its_beginning_or_at_its_end(run):
    def state(status: str, began_ago: float) -> str:
        write(run / "STATUS.json", said(status, age=60))
        beat(run, age=70)
        life = {"time": NOW - began_ago, "job": "4711", "restart": 1, "event": "started"}
        write_lines(run / "jobs" / "lives.jsonl", [life])
        return read_state(run, NOW, {"4711": RUNS}).state

    assert [state("failed", 80), state("failed", 30)] == ["failed", "starting"]
    assert [state("stopped", 80), state("stopped", 30)] == ["stopped", "starting"]
    assert [state("training", 400), state("training", 30)] == ["no sign of life", "starting"]


def test_no_sign_of_life_says_since_when_what_is_saved_and_what_to_do(run):
    beat(run, age=190)
    assert texts(read_state(run, NOW)) == [
        "no sign of life for 3 min: all ranks; last save: step 100 of stage 1; run the same command again"
    ]


def test_a_run_without_signs_of_life_is_believed_for_ten_minutes(run):
    """As versions write it that knew neither these nor how long a stage is."""
    (run / "ranks" / "beat-0000.json").unlink()
    old = {key: value for key, value in line(120, 300).items() if key not in ("total", "left_s", "time")}
    write_lines(run / "metrics.jsonl", [old])
    write(run / "STATUS.json", said("training", age=300))
    state = read_state(run, NOW)
    assert (state.state, state.total, state.beat_age_s, len(state.ranks)) == ("training", 1000, None, 1)
    assert read_state(run, NOW + 400).state == "no sign of life"


def test_restarts_and_the_end_of_the_last_life(run):
    life = {"job": "4711", "nodes": "n[1-2]", "ranks": 4}
    ended = {"event": "ended", "code": 75, "why": "stopped on request and saved", "then": "requeued"}
    lives = [life | {"time": NOW - 900 + i, "restart": i // 2} for i in range(6)]
    records = [record | (ended if i % 2 else {"event": "started"}) for i, record in enumerate(lives)]
    write_lines(run / "jobs" / "lives.jsonl", records)
    write(run / "STATUS.json", said("stopped"))
    beat(run, age=800)
    state = read_state(run, NOW)
    assert (state.restarts, state.state, state.message) == (2, "queued", "stopped on request and saved; requeued")
    assert read_state(run, NOW, {"4711": "gone"}).state == "stopped"
    assert state.alarms == ()
    write_lines(run / "jobs" / "lives.jsonl", [records[1]] * 9)
    assert texts(read_state(run, NOW)) == ["queued again 9 of 10 times; raise job.requeues if it needs more"]
    write_lines(run / "jobs" / "lives.jsonl", [*[records[1]] * 9, records[0] | {"job": "4712"}])
    assert read_state(run, NOW).alarms == ()  # another job counts anew


# --- alarms ----------------------------------------------------------------------------------------------------------


def test_a_rank_whose_sign_stands_still_is_named(run):
    ranks(run)
    assert read_state(run, NOW).state == "training"
    beat(run, 2, age=25, world=3)
    write_lines(run / "metrics.jsonl", [line(age=24)])
    state = read_state(run, NOW)
    assert state.state == "STUCK"
    assert texts(state) == ["rank 2 on n3 has given no sign of life for 25 s; the others wait for it"]
    assert (state.alarms[0].kind, state.alarms[0].rank, state.eta_s) == ("stuck", 2, None)


def test_a_rank_that_never_came_is_named(run):
    ranks(run)
    (run / "ranks" / "beat-0001.json").unlink()
    write_lines(run / "metrics.jsonl", [line(age=30)])
    state = read_state(run, NOW)
    assert texts(state) == ["rank 1 has given no sign of life; the others wait for it"]
    assert (state.ranks[1].beat_age_s, state.ranks[1].host) == (None, None)


def test_a_rank_that_all_wait_for_at_the_same_step_is_named(run):
    ranks(run)
    write_lines(run / "metrics.jsonl", [line(age=12)])
    assert read_state(run, NOW).state == "training"
    write_lines(run / "metrics.jsonl", [line(age=20)])
    state = read_state(run, NOW)
    assert texts(state) == ["rank 1 on n2 has been at step 120 for 20 s; the others wait for it"]
    ranks(run, step=220)  # which took 10 s more
    assert read_state(run, NOW).state == "training"


def test_the_first_rank_may_work_alone_between_the_stages(run):
    ranks(run, step=1000)
    write_lines(run / "metrics.jsonl", [line(1000, age=300)])
    assert read_state(run, NOW).state == "training"


def test_a_clock_that_differs_is_told_and_is_no_death(run):
    ranks(run)
    beat(run, 1, age=-40, world=3)
    beat(run, 2, age=60, seen=1, world=3)
    state = read_state(run, NOW)
    assert state.state == "training"
    assert texts(state) == [
        "the clock of n2 is 40 s ahead; set it (chrony, ntpd)",
        "the clock of n3 is 59 s behind; set it (chrony, ntpd)",
    ]
    assert state.ranks[1].beat_age_s == 0


def test_signs_of_an_earlier_life_are_not_of_this_one(run):
    ranks(run)
    beat(run, 7, world=8, age=900)
    assert len(read_state(run, NOW).ranks) == 3
    beat(run, 2, world=3, age=900)  # a new life just begins: the first rank has said so in STATUS.json
    write(run / "STATUS.json", said("training", age=3))
    write_lines(run / "metrics.jsonl", [])
    assert read_state(run, NOW).state == "training"


def test_a_rank_that_is_slow_line_after_line_is_named(run):
    ranks(run)
    slow = {"ranks": 3, "slowest_rank": 2, "slowest_times": 1.7}
    write_lines(run / "metrics.jsonl", [line(), line(**slow), line(**slow)])
    assert (read_state(run, NOW).slowest_rank, read_state(run, NOW).alarms) == (2, ())
    write_lines(run / "metrics.jsonl", [line(**slow)] * 3)
    assert texts(read_state(run, NOW)) == ["rank 2 on n3 is slow: 1.7 times the work of the others per step"]


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([1.1 - 0.001 * i for i in range(60)], []),
        ([1.0] * 60, []),
        ([1.0] * 30 + [1.2] * 30, ["the loss rises: 1, then 1.2 (medians of the last 60 log lines)"]),
        ([1.0, float("nan")], ["the loss is nan at step 120"]),
    ],
)
def test_a_loss_that_rises_or_is_no_number(run, losses, told):
    write_lines(run / "metrics.jsonl", [line(loss=loss) for loss in losses])
    state = read_state(run, NOW)
    assert texts(state) == told
    assert json.loads(as_json([state]))[0]["state"] == "training"


def test_a_failed_run_says_why(run):
    write(run / "STATUS.json", said("failed", message="No space left on device"))
    beat(run, age=100)
    assert texts(read_state(run, NOW)) == ["No space left on device"]


# --- where runs are --------------------------------------------------------------------------------------------------


def test_runs_are_found_two_folders_deep_and_named_by_what_tells_them_apart(tmp_path, refusal):
    for name in ("a/x/0001", "b/x/0001", "b/x/0002", "lone", "too/deep/to/see", ".hidden/run", "store.zarr/run"):
        write(tmp_path / name / "STATUS.json", said("complete"))
    write(tmp_path / "lone" / "inside" / "STATUS.json", said("complete"))
    found = find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "lone", tmp_path, tmp_path / "a"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/x/0001", "b/x/0001", "b/x/0002", "lone"]
    assert distinct_names(found) == ["a/x/0001", "b/x/0001", "0002", "lone"]
    assert [state.name for state in read_states([tmp_path])] == ["lone"]
    refusal(RunError, ["too: no run directory"], lambda: read_states([tmp_path / "too"]))
    refusal(RunError, ["nowhere: no such folder"], lambda: read_states([tmp_path / "nowhere"]))


def test_long_logs_are_thinned_and_half_a_line_is_left_out(run):
    write_lines(run / "metrics.jsonl", [line(step, epoch=step) for step in range(1, 7001)])
    write_lines(run / "ranks" / "rank-0001.jsonl", [line(step) for step in range(1, 12)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": 1, "st')
    records, of_ranks = read_curves(run)
    steps = [record["step"] for record in records]
    assert (len(steps), steps[0], steps[-1]) == (2000, 1, 7000)
    assert steps == sorted(set(steps))
    assert [record["step"] for record in of_ranks[1]] == list(range(1, 12))
    assert read_state(run, NOW).step == 7000


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*line(), *said("training"), "rank", "world", "host", "job", "event", "then", "id", "restart", "waiting"]
RECORDS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), JSON, max_size=8)
NAMES = ("STATUS.json", "metrics.jsonl", "ranks/beat-0000.json", "ranks/beat-0001.json", "ranks/rank-0001.jsonl",
         "jobs/job.json", "jobs/lives.jsonl", "config.toml")  # fmt: skip


LINES = st.lists(RECORDS, max_size=3).map(lambda records: "\n".join(map(json.dumps, records)).encode())


@given(files=st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=40) | LINES), cut=st.integers(0, 200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_in_the_files_there_is_a_state(files, cut):
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        for place, content in files.items():
            (run / place).parent.mkdir(parents=True, exist_ok=True)
            (run / place).write_bytes(content[: len(content) - cut] if cut < len(content) else content)
        run.mkdir(exist_ok=True)
        for queue in (None, {"4711": QUEUED}):
            state = read_state(run, NOW, queue)
            assert json.loads(as_json([state]))[0]["name"] == "run"
            assert state.state in table([state])
        read_curves(run)


def test_files_may_come_and_go_while_they_are_read(run):
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            for rank in range(3):
                beat(run, rank, world=3)
            write_lines(run / "metrics.jsonl", [line()] * 50)
            for path in (run / "metrics.jsonl", *(run / "ranks").iterdir()):
                path.unlink()

    other = threading.Thread(target=disturb)
    other.start()
    try:
        states = {read_state(run, NOW).state for _ in range(300)}
    finally:
        ended.set()
        other.join()
    assert states <= {"training", "STUCK", "no sign of life"}


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
    from rich.text import Text

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
    endless = [*tiny_settings, "stage1.epochs=100000", "output.log_seconds=1"]
    wanted = {"pair": (endless, "2"), "lone": (endless, "1"), "short": (tiny_settings, "1")}
    started = []
    for name, (values, processes) in wanted.items():
        options = [option for value in values for option in ("--set", value)]
        command = [
            sys.executable,
            "-m",
            "spire_dist.cli",
            "train",
            "--run",
            folder / name,
            "--processes",
            processes,
            *options,
        ]
        with open(folder / f"{name}.log", "w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
    yield folder
    for process in started:
        kill(process.pid)
        process.wait(30)


def kill(pid: int) -> None:
    """SIGKILL for a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def wait_for(run: Path, reached: Callable[[RunState], bool], patience_s: float) -> RunState:
    until = time.monotonic() + patience_s
    while not reached(state := read_state(run)):
        assert time.monotonic() < until, f"{state}\n{run.with_suffix('.log').read_text()}"
        time.sleep(0.2)
    return state


@pytest.mark.slow
def test_real_runs_that_train_end_hang_and_die(live):
    pair = wait_for(live / "pair", lambda state: state.state == "training" and state.loss is not None, 300)
    lone = wait_for(live / "lone", lambda state: state.state == "training" and state.loss is not None, 300)
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
