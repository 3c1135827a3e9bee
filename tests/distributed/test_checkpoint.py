"""Checkpoints: complete or not there, whatever happens in between; and data, never code."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spire_dist.distributed import checkpoint
from spire_dist.distributed.checkpoint import Rows, Tensors, load_checkpoint, save_checkpoint, write_durably
from spire_dist.distributed.mesh import Mesh
from spire_dist.errors import RunError


def save(run: Path, step: int, value: float, keep: int) -> Path:
    facts = {"step": int(value), "nested": [{"name": "a", "numbers": [1, 2.5]}]}
    return save_checkpoint(run, step, {"tensor": torch.full((100,), value)}, facts, keep)


def load(run: Path) -> dict:
    """Facts, and the one number of the tensor."""
    loaded = load_checkpoint(run)
    assert loaded is not None
    tensors, facts = loaded
    assert list(tensors) == ["tensor"]
    (value,) = set(tensors["tensor"].tolist())
    return facts | {"value": value}


def folders(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Killed(BaseException):
    """Stands for the end of the process: no handler of the code under test may see it as an error."""


def kill_at(monkeypatch, target: object, function: str, call: int) -> None:
    """Die in the `call`-th use of a function by a save."""
    original, calls = getattr(target, function), []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(target, function, dying)


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7, 7.0, keep=2)
    assert load(tmp_path) == {"step": 7, "nested": [{"name": "a", "numbers": [1, 2.5]}], "value": 7}


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100000040):
        save(tmp_path, step, step, keep=2)
    assert folders(tmp_path) == ["step-00000020", "step-100000040"]
    assert (tmp_path / "latest").read_text() == "step-100000040\n"


@pytest.mark.parametrize(
    ("target", "function", "call"),
    [(os, "fsync", call) for call in range(1, 8)] + [(os, "replace", 1), (os, "replace", 2), (os, "replace", 3)],
)
def test_killed_at_any_moment_of_a_save_there_is_a_whole_checkpoint(tmp_path, monkeypatch, target, function, call):
    save(tmp_path, 1, 1.0, keep=1)
    with monkeypatch.context() as patch:
        kill_at(patch, target, function, call)
        with pytest.raises(BaseException, match=r"^$|Killed"):
            save(tmp_path, 2, 2.0, keep=1)
    assert load(tmp_path)["value"] in (1, 2)
    save(tmp_path, 3, 3.0, keep=1)
    assert load(tmp_path)["step"] == 3
    assert folders(tmp_path) == ["step-00000003"]


def test_a_step_that_is_there_already_is_not_touched(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in save(tmp_path, 1, 1.0, keep=1).iterdir()}
    (tmp_path / "latest").write_text("elsewhere\n")
    assert {path: path.stat().st_mtime_ns for path in save(tmp_path, 1, 1.0, keep=1).iterdir()} == before
    assert load(tmp_path)["step"] == 1


def test_latest_moves_only_after_the_data_is_committed(tmp_path, monkeypatch):
    seen = []

    def watch(path, text):
        if path.name == "latest":
            seen.append((tmp_path / "checkpoints" / "step-00000004" / "COMMIT").exists())
        write_durably(path, text)

    monkeypatch.setattr(checkpoint, "write_durably", watch)
    save(tmp_path, 4, 4.0, keep=1)
    assert seen == [True]


def test_an_uncommitted_checkpoint_is_refused(tmp_path, refusal):
    (save(tmp_path, 3, 3.0, keep=1) / "COMMIT").unlink()
    refusal(RunError, ["latest", "step-00000003", "not a complete checkpoint"], lambda: str(load_checkpoint(tmp_path)))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_checkpoint_is_refused_and_says_what_to_do(tmp_path, refusal, name, share):
    path = save(tmp_path, 3, 3.0, keep=1) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(RunError, ["step-00000003", "cannot be read", "older one"], lambda: str(load_checkpoint(tmp_path)))


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
def test_loading_cannot_run_code(tmp_path, refusal, name, plain):
    path, trace = save(tmp_path, 3, 3.0, keep=1) / name, tmp_path / "was run"
    bad = {"step": Malicious(str(trace))}
    if plain:
        path.write_bytes(pickle.dumps(bad, protocol=2))
    else:
        torch.save(bad, tmp_path / "bad.pt")  # torch refuses a name that begins with a point
        path.write_bytes((tmp_path / "bad.pt").read_bytes())
    refusal(RunError, ["cannot be read"], lambda: str(load_checkpoint(tmp_path)))
    assert not trace.exists()


# ---- several ranks

MESHES = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
"""(replicate, gauss)"""
WHOLE = {
    "shared": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    "gaussians": torch.randn(13, 3, generator=torch.Generator().manual_seed(2)),
    "latents": torch.randn(9, 2, generator=torch.Generator().manual_seed(3)),
    "few": torch.arange(2),
    "count": torch.tensor(5),
}
AXES = {"gaussians": "gauss", "latents": "world", "few": "world"}


def _own(mesh: Mesh, name: str) -> Tensor:
    whole = WHOLE[name]
    part, parts = (mesh.gauss_rank, mesh.gauss) if AXES[name] == "gauss" else (mesh.rank, mesh.world)
    size = -(-len(whole) // parts)
    return whole[part * size : (part + 1) * size].clone()


def _save_share(mesh: Mesh, run: Path) -> None:
    tensors: Tensors = {
        name: Rows(_own(mesh, name), len(whole), AXES[name]) if name in AXES else whole  # type: ignore[arg-type]
        for name, whole in WHOLE.items()
    }
    save_checkpoint(run, 2, tensors, {"step": 2}, 1, mesh)


def _load_share(mesh: Mesh, run: Path) -> list[str]:
    """What is not as it should be on this rank."""
    loaded = load_checkpoint(run, mesh)
    assert loaded is not None
    tensors, facts = loaded
    wrong = [] if facts == {"step": 2} and set(tensors) == set(WHOLE) else ["names or facts"]
    for name, found in tensors.items():
        mine = _own(mesh, name) if name in AXES else WHOLE[name]
        values = found.own if isinstance(found, Rows) else found
        if not torch.equal(values, mine):
            wrong.append(f"{name}: {values} is not {mine}")
        if isinstance(found, Rows) != (name in AXES and mesh.axes is not None):
            wrong.append(f"{name} is {type(found)}")
    return wrong


@pytest.mark.parametrize("before", MESHES, ids=str)
def test_any_mesh_reads_what_any_other_saved(ranks, tmp_path, before):
    ranks(_save_share, *before, tmp_path)
    for after in MESHES:
        assert ranks(_load_share, *after, tmp_path) == [[]] * (after[0] * after[1]), after
