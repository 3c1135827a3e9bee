"""Who trains in a run directory: two programs, and two lives of a Slurm job."""

import json
from pathlib import Path

import pytest
import torch

from spire_dist.distributed.checkpoint import load_checkpoint, save_checkpoint
from spire_dist.distributed.holder import LOCK, _held, refuse_superseded, sole_trainer, superseded
from spire_dist.errors import RunError
from spire_dist.training.run import write_status


def live(monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def test_a_second_program_is_refused_by_name_and_may_come_later(tmp_path: Path):
    with sole_trainer(tmp_path):
        assert not superseded(tmp_path)
        with pytest.raises(RunError, match=r"another process trains here \(pid \d+ on "), sole_trainer(tmp_path):
            pass
    with sole_trainer(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.parametrize(("job", "restart"), [("4711", 0), ("4711", 1), ("4712", 2)])
def test_only_a_later_life_of_the_same_job_takes_over(tmp_path, monkeypatch, job, restart):
    live(monkeypatch, "4711", 1)
    with sole_trainer(tmp_path):
        live(monkeypatch, job, restart)
        with pytest.raises(RunError, match="another process trains here"), sole_trainer(tmp_path):
            pass


def test_what_a_newer_life_has_taken_the_old_one_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    numbers = {"x": torch.arange(4.0)}
    live(monkeypatch, "4711", 0)
    with sole_trainer(tmp_path):
        save_checkpoint(tmp_path, 1, numbers, {}, keep=2)
        write_status(tmp_path, "training", 1, 1)
        old = _held.pop(tmp_path.absolute())
        live(monkeypatch, "4711", 1)
        with sole_trainer(tmp_path):  # as if in another process, on another node
            save_checkpoint(tmp_path, 2, numbers, {}, keep=2)
            write_status(tmp_path, "training", 1, 2)
            new = _held[tmp_path.absolute()]
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

            live(monkeypatch, "4711", 0)
            _held[tmp_path.absolute()] = old
            assert superseded(tmp_path)
            with pytest.raises(RunError, match="a newer life of this job"):
                save_checkpoint(tmp_path, 3, {"x": torch.zeros(4)}, {}, keep=1)
            write_status(tmp_path, "failed", 1, 1)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

            live(monkeypatch, "4711", 1)
            _held[tmp_path.absolute()] = new
            assert not superseded(tmp_path)
        _held[tmp_path.absolute()] = old
        live(monkeypatch, "4711", 0)
        with pytest.raises(RunError):  # when the new one has ended, too
            refuse_superseded(tmp_path)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded[0]["x"], numbers["x"])  # type: ignore[arg-type]


def test_other_ranks_of_an_old_life_know_it_by_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / LOCK).write_text(json.dumps({"life": "4711-3", "host": "n2", "pid": 1, "key": "x"}))
    for job, restart, expected in (("4711", 2, True), ("4711", 3, False), ("4711", 4, False), ("99", 2, False)):
        live(monkeypatch, job, restart)
        assert superseded(tmp_path) == expected
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not superseded(tmp_path)


def test_saves_of_two_lives_are_written_under_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    live(monkeypatch, "4711", 0)
    half_written = tmp_path / "checkpoints" / ".step-00000001-4711-0.partial"
    half_written.mkdir(parents=True)
    live(monkeypatch, "4711", 1)
    seen: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (seen.append(self.name), rename(self, target))[1])
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(1)}, {}, keep=1)
    assert ".step-00000001-4711-1.partial" in seen
