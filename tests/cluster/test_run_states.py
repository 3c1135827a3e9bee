"""States of runs: what is made of directories in every condition, damaged ones and such that change meanwhile."""

import json
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.run_files import find_runs
from cluster.run_states import distinct_names, read_curves, read_state, read_states
from cluster.status import as_json, table
from spire_dist.errors import RunError
from tests.cluster.made_runs import NOW, beat, line, make_run, ranks, said, texts, write, write_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


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


def test_steps_may_become_slower_until_a_log_line_is_due(run):
    ranks(run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("log_seconds = 10.0", "log_seconds = 60.0"))
    write_lines(run / "metrics.jsonl", [line(age=50)])
    assert read_state(run, NOW).state == "training"
    assert read_state(run, NOW + 11).state == "STUCK"


def test_all_ranks_may_stand_still_for_a_save_and_no_longer(run):
    write_lines(run / "metrics.jsonl", [line(age=110)])
    assert read_state(run, NOW).state == "training"
    write_lines(run / "metrics.jsonl", [line(age=170)])
    state = read_state(run, NOW)
    assert (state.state, state.alarms[0].rank) == ("STUCK", None)
    assert texts(state) == ["step 120 has not ended for 3 min, though all ranks give signs of life"]


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
    write_lines(run / "metrics.jsonl", [line(**slow)])
    assert read_state(run, NOW).alarms == ()
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
