"""Checkpoints: complete or not there, whatever happens in between; and data, never code."""

import os
import pickle

import pytest
import torch

from spire_dist.distributed import checkpoint
from spire_dist.distributed.checkpoint import load_checkpoint, save_checkpoint, write_durably
from spire_dist.errors import RunError


def state(value: float) -> dict:
    return {"step": int(value), "tensor": torch.full((100,), value), "nested": [{"name": "a", "numbers": (1, 2.5)}]}


def folders(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Killed(BaseException):
    """Stands for the end of the process: no handler of the code under test may see it as an error."""


def kill_at(monkeypatch, function: str, call: int) -> None:
    """Die in the `call`-th use of `function` by a save."""
    target = torch if function == "save" else os
    original, calls = getattr(target, function), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            if function == "save":
                arguments[1].write_bytes(b"PK half a checkpoint")
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(target, function, dying)


def test_what_was_saved_comes_back(tmp_path):
    save_checkpoint(tmp_path, 7, state(7.0), keep=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.pop("tensor"), torch.full((100,), 7.0))
    assert loaded == {"step": 7, "nested": [{"name": "a", "numbers": (1, 2.5)}]}


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100000040):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert folders(tmp_path) == ["step-00000020", "step-100000040"]
    assert (tmp_path / "latest").read_text() == "step-100000040\n"


@pytest.mark.parametrize(
    ("function", "call"), [("save", 1), ("fsync", 1), ("replace", 1), ("replace", 2), ("replace", 3)]
)
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_killed_at_any_moment_of_a_save_there_is_a_whole_checkpoint(tmp_path, monkeypatch, function, call, again):
    save_checkpoint(tmp_path, 1, state(1.0), keep=1)
    with monkeypatch.context() as patch:
        kill_at(patch, function, call)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 1 if again else 2, state(1.0 if again else 2.0), keep=1)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1
    save_checkpoint(tmp_path, 3, state(3.0), keep=1)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 3
    assert folders(tmp_path) == ["step-00000003"]


def test_latest_moves_only_after_the_data_is_committed(tmp_path, monkeypatch):
    seen = []

    def watch(path, text):
        folder = tmp_path / "checkpoints" / "step-00000004"
        if path.name == "latest":
            seen.append((folder / "COMMIT").exists() and torch.load(folder / "state.pt")["step"] == 4)
        write_durably(path, text)

    monkeypatch.setattr(checkpoint, "write_durably", watch)
    save_checkpoint(tmp_path, 4, state(4.0), keep=1)
    assert seen == [True]


def test_an_uncommitted_checkpoint_is_refused(tmp_path, refusal):
    folder = save_checkpoint(tmp_path, 3, state(3.0), keep=1)
    (folder / "COMMIT").unlink()
    refusal(RunError, ["latest", "step-00000003", "not a complete checkpoint"], lambda: load_checkpoint(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_checkpoint_is_refused_and_says_what_to_do(tmp_path, refusal, share):
    folder = save_checkpoint(tmp_path, 3, state(3.0), keep=1)
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[: int(share * len(content))])
    refusal(RunError, ["state.pt", "cannot be read", "older one"], lambda: load_checkpoint(tmp_path))


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
def test_loading_cannot_run_code(tmp_path, refusal, plain):
    folder, trace = save_checkpoint(tmp_path, 3, state(3.0), keep=1), tmp_path / "was run"
    bad = {"step": Malicious(str(trace))}
    if plain:
        (folder / "state.pt").write_bytes(pickle.dumps(bad, protocol=2))
    else:
        torch.save(bad, folder / "state.pt")
    refusal(RunError, ["state.pt", "cannot be read"], lambda: load_checkpoint(tmp_path))
    assert not trace.exists()
