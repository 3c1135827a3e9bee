"""A stage trained by any number of ranks, shares and engine: the losses of one process, and checkpoints all can go on from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spire_dist.config import RunConfig, load_config
from spire_dist.data.loader import BatchSource
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.heartbeat import Heartbeat
from spire_dist.distributed.mesh import Mesh
from spire_dist.distributed.stopping import StopFlag
from spire_dist.model.gaussians import Gaussians
from spire_dist.model.latent_table import at_home
from spire_dist.model.latents import ImageEncoder, starting_latents
from spire_dist.model.mixtures import HierarchicalMixture
from spire_dist.training.engines import DataParallel
from spire_dist.training.metrics import RunLog
from spire_dist.training.saving import load_trainee, read_state, save_trainee, write_start
from spire_dist.training.trainer import agree, learn, train_stage, training_order

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
ANCHORS, GAUSSIANS, STEPS = 5, 101, 20


@dataclass(frozen=True)
class Way:
    """How a run is shared."""

    replicate: int
    gauss: int
    engine: str = "ddp"
    zero: int = 0

    def __str__(self) -> str:
        return f"{self.replicate}x{self.gauss}-{self.engine}{self.zero if self.engine == 'deepspeed' else ''}"


DDP = [Way(1, 1), Way(2, 1), Way(1, 2), Way(3, 1), Way(1, 3), Way(4, 1), Way(2, 2), Way(1, 4)]
SPEED = [
    *(Way(1, 1, "deepspeed", zero) for zero in (0, 2)), *(Way(2, 1, "deepspeed", zero) for zero in range(4)),
    Way(1, 2, "deepspeed", 1), Way(3, 1, "deepspeed", 1), Way(2, 2, "deepspeed", 2),
]  # fmt: skip


def _configured(
    store: Path, way: Way, kind: str = "table", clip: float | None = None, refine: bool = False, tries: int = 0
) -> RunConfig:
    # 48 is divided by 1, 2, 3 and 4 ranks; the last of the five steps of an epoch has no particle for some of them.
    settings = [
        f"data.store='{store}'", "threads=1", "features=8", "latent.dimension=2", "latent.encoder_width=16",
        f"latent.kind='{kind}'", "stage2.batch=48", f"stage2.gaussians={GAUSSIANS}", "stage2.layers=1", "stage2.hidden=8",
        "stage2.anchor_hidden=8", f"parallel.gauss={way.gauss}", f"parallel.engine='{way.engine}'", f"parallel.zero={way.zero}",
        "device='cpu'", "output.keep=10", f"stage2.tries={tries}", f"poses.refine={str(refine).lower()}",
        *([f"stage2.clip_norm={clip}"] if clip else []),
    ]  # fmt: skip
    return load_config(overrides=settings)


def _begun(run: Path, config: RunConfig) -> Path:
    """A run directory at the start of a stage 2 that is made up, nothing in it zero."""
    torch.manual_seed(2)
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    gaussians = Gaussians(2 * normal(GAUSSIANS, 3), 1 + 0.1 * normal(GAUSSIANS).abs(), normal(GAUSSIANS, 8), unit=0.3)
    anchor_of = torch.from_numpy(np.sort(rng.integers(0, ANCHORS, GAUSSIANS)))
    mixture = HierarchicalMixture(gaussians, anchor_of, 3 * normal(ANCHORS, 3), normal(ANCHORS, 8), 2, config.stage2)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter += 0.02 * normal(*parameter.shape)
    source = BatchSource(ParticleStore.open(config.data.store))
    count, box = source.store.count, source.store.box
    latents = (
        at_home(starting_latents(count, 2, 0)) if config.latent.kind == "table" else ImageEncoder(box, config.latent)
    )
    write_start(run, 2, mixture, latents, source, config, 0.0)
    return run


def _go_on(mesh: Mesh, run: Path, config: RunConfig, steps: int) -> dict[str, Any]:
    """`steps` more from the newest checkpoint, and a save; the losses, and the rows this rank had."""
    torch.set_num_threads(1)
    source = BatchSource(ParticleStore.open(config.data.store))
    trainee = load_trainee(run, source, config, mesh, CPU)
    batches = source.training(training_order(source, config, 2), trainee.step, mesh.rank, mesh.world)
    losses, rows = [], []
    for _ in range(steps):
        batch = next(batches)
        own = learn(trainee, batch, config, 0.5, False, trainee.step // 5 + 1)
        trainee.step += 1
        losses.append(agree(own, [], mesh)[1] / batch.total)
        rows.append(batch.rows.tolist())
    batches.close()
    save_trainee(run, trainee, source, config, 0.0)
    return {"losses": losses, "rows": rows}


def _run(ranks: Any, way: Way, run: Path, config: RunConfig, steps: int) -> dict[str, Any]:
    found = ranks(_go_on, way.replicate, way.gauss, run, config, steps)
    assert all(rank["losses"] == found[0]["losses"] for rank in found)
    rows = [[row for rank in found for row in rank["rows"][step]] for step in range(steps)]
    return {"losses": found[0]["losses"], "rows": rows}


def _assert_same_state(one: Path, other: Path) -> None:
    first, second = read_state(one), read_state(other)
    assert first is not None
    assert second is not None
    assert first.step == second.step
    for a, b in ((first.model, second.model), (first.memory, second.memory)):
        assert a.keys() == b.keys()
        assert not [name for name in a if not torch.equal(a[name], b[name])]
    for a, b in ((first.latents, second.latents), (first.poses, second.poses)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.fixture(scope="module")
def alone(tiny_store, tmp_path_factory):
    """Two times `STEPS` / 2 of one process, by kind of latent: (the run directory, losses, rows)."""
    found = {}
    for kind in ("table", "encoder"):
        config = _configured(tiny_store, Way(1, 1), kind)
        run = _begun(tmp_path_factory.mktemp("alone") / "run", config)
        first = _go_on(Mesh(), run, config, STEPS)
        found[kind] = run, first["losses"], first["rows"]
    losses = found["table"][1]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5]), "nothing is learned"
    return found


@pytest.mark.parametrize("kind", ["table", "encoder"])
@pytest.mark.parametrize("way", [*DDP, *SPEED], ids=str)
def test_any_way_has_the_losses_and_the_order_of_one_process(ranks, alone, tiny_store, tmp_path, way, kind):
    _, losses, rows = alone[kind]
    config = _configured(tiny_store, way, kind)
    found = _run(ranks, way, _begun(tmp_path / "run", config), config, STEPS)
    np.testing.assert_allclose(found["losses"], losses, rtol=2e-5)
    assert [sorted(step) for step in found["rows"]] == [sorted(step) for step in rows]
    epoch = [row for step in found["rows"][:5] for row in step]
    assert sorted(epoch) == list(range(240))


@pytest.mark.parametrize("way", [Way(2, 1), Way(1, 2), Way(3, 1), Way(2, 1, "deepspeed", 3)], ids=str)
def test_any_way_has_the_jumps_of_one_process(ranks, tiny_store, tmp_path, way):
    """Of one step: a jump is all or nothing, and later rounding decides some, where two latents are as good as each other."""
    config, shared = (_configured(tiny_store, w, tries=8) for w in (Way(1, 1), way))
    alone, run = (_begun(tmp_path / name, config) for name in ("alone", "run"))
    begun = read_state(alone)
    [expected], [loss] = _go_on(Mesh(), alone, config, 1)["losses"], _run(ranks, way, run, shared, 1)["losses"]
    assert loss == pytest.approx(expected, rel=2e-5)
    start, first, second = ((state.latents if state else None) for state in (begun, read_state(alone), read_state(run)))
    assert start is not None
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second[:, 0], first[:, 0], rtol=0, atol=1e-4)
    # Who jumped has the very numbers of another particle, and Adam has forgotten what it had of the old ones.
    visited = (first != start).flatten(1).any(1)
    jumped = visited & (first[:, 1:] == 0).flatten(1).all(1)
    assert 5 < int(jumped.sum()) < int(visited.sum()) <= 48
    assert (torch.cdist(first[jumped, 0].double(), start[:, 0].double()).amin(1) == 0).all()


@pytest.mark.parametrize("way", [Way(1, 1), Way(2, 1), Way(1, 3), Way(2, 2), Way(2, 1, "deepspeed", 2)], ids=str)
def test_a_stop_in_between_changes_no_bit(ranks, tiny_store, tmp_path, way):
    config = _configured(tiny_store, way, tries=2)
    whole, cut = (_begun(tmp_path / name, config) for name in ("whole", "cut"))
    expected = _run(ranks, way, whole, config, STEPS)
    found = [_run(ranks, way, cut, config, STEPS // 2) for _ in range(2)]
    assert found[0]["losses"] + found[1]["losses"] == expected["losses"]
    _assert_same_state(cut, whole)


@pytest.mark.parametrize("kind", ["table", "encoder"])
@pytest.mark.parametrize("way", [Way(2, 1), Way(1, 2), Way(2, 2), Way(2, 1, "deepspeed", 2)], ids=str)
def test_any_way_refines_poses_as_one_process_does(ranks, tiny_store, tmp_path, way, kind):
    """From a checkpoint of one process halfway on, and at the end saved as one process saves it."""
    config, shared = (_configured(tiny_store, w, kind, refine=True) for w in (Way(1, 1), way))
    alone, run = (_begun(tmp_path / name, config) for name in ("alone", "run"))
    expected = _go_on(Mesh(), alone, config, STEPS // 2)["losses"] + _go_on(Mesh(), alone, config, STEPS // 2)["losses"]
    losses = _go_on(Mesh(), run, config, STEPS // 2)["losses"] + _run(ranks, way, run, shared, STEPS // 2)["losses"]
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    first, second = read_state(alone), read_state(run)
    assert first is not None
    assert second is not None
    assert first.poses is not None
    assert second.poses is not None
    assert float(first.poses[:, 0].abs().mean()) > 0.5, "nothing is refined"
    # In units of a step. Adam's steps hide a gradient's size: where that is nearly zero, rounding decides its sign.
    differences = (second.poses - first.poses)[:, 0].abs()
    assert float(differences.median()) < 1e-4
    assert float((differences > 0.02).float().mean()) < 0.01


@pytest.mark.parametrize("first", [Way(1, 1), Way(2, 1), Way(1, 3), Way(2, 2), Way(2, 1, "deepspeed", 1),
                                   Way(2, 1, "deepspeed", 3)], ids=str)  # fmt: skip
def test_any_way_goes_on_from_any_other(ranks, tiny_store, tmp_path, first):
    config = _configured(tiny_store, first)
    saved = _begun(tmp_path / "saved", config)
    _run(ranks, first, saved, config, 7)
    expected = None
    for way in (Way(1, 1), Way(1, 2), Way(3, 1), Way(1, 4), Way(2, 2), Way(1, 1, "deepspeed", 0), Way(2, 1, "deepspeed", 2),
                Way(2, 1, "deepspeed", 3), Way(1, 2, "deepspeed", 1)):  # fmt: skip
        config = _configured(tiny_store, way)
        copied = tmp_path / str(way)
        copied.mkdir()
        (copied / "checkpoints").symlink_to(saved / "checkpoints")
        (copied / "latest").write_text((saved / "latest").read_text())
        again = tmp_path / f"{way}-again"
        ranks(_copy, way.replicate, way.gauss, copied, again, config)
        _assert_same_state(again, saved)
        found = _run(ranks, way, again, config, 6)
        expected = expected or found
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-5)
        assert [sorted(step) for step in found["rows"]] == [sorted(step) for step in expected["rows"]]


def _copy(mesh: Mesh, run: Path, other: Path, config: RunConfig) -> None:
    source = BatchSource(ParticleStore.open(config.data.store))
    save_trainee(other, load_trainee(run, source, config, mesh, CPU), source, config, 0.0)


@pytest.mark.parametrize("way", [Way(1, 1), Way(2, 1), Way(1, 3), Way(2, 2), Way(2, 1, "deepspeed", 1),
                                 Way(2, 1, "deepspeed", 3)], ids=str)  # fmt: skip
def test_a_clipped_gradient_is_the_same_on_all_ways(ranks, tiny_store, tmp_path, way):
    """Adam hides a common factor of all steps, not one that differs from step to step: the memory of it shows both."""
    found = {}
    for name, shared, clip in (("free", Way(1, 1), None), ("alone", Way(1, 1), 1.0), ("ranks", way, 1.0)):
        config = _configured(tiny_store, shared, clip=clip)
        run = _begun(tmp_path / name, config)
        _run(ranks, shared, run, config, 6)
        state = read_state(run)
        assert state is not None
        found[name] = {key: value for key, value in state.memory.items() if key.endswith("exp_avg")}
    for key, expected in found["alone"].items():
        scale = float(expected.abs().max())
        assert float(found["free"][key].abs().max()) > 1.5 * scale, f"{key}: nothing is clipped"
        torch.testing.assert_close(found["ranks"][key], expected, rtol=0, atol=2e-4 * scale)


def _nan(mesh: Mesh, run: Path, config: RunConfig) -> str:
    source = BatchSource(ParticleStore.open(config.data.store))
    trainee = load_trainee(run, source, config, mesh, CPU)
    if mesh.rank == mesh.world - 1:
        with torch.no_grad():
            trainee.mixture.gaussians.amplitudes[0] = torch.nan
    try:
        save_trainee(run, trainee, source, config, 0.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_what_is_not_finite_on_one_rank_is_saved_by_none(ranks, tiny_store, tmp_path):
    config = _configured(tiny_store, Way(1, 2))
    run = _begun(tmp_path / "run", config)
    before = sorted((run / "checkpoints").iterdir())
    found = ranks(_nan, 1, 2, run, config)
    assert all(text.startswith("RunError") and "not finite" in text for text in found)
    assert "amplitudes" in found[1]
    assert sorted((run / "checkpoints").iterdir()) == before


def _poisoned(mesh: Mesh, run: Path, config: RunConfig) -> tuple[str, list[int]]:
    """A run in which the objective of the last rank is no number: how it ends, and the rows that rank had."""
    source = BatchSource(ParticleStore.open(config.data.store))
    trainee = load_trainee(run, source, config, mesh, CPU)
    assert isinstance(trainee.engine, DataParallel)
    if mesh.rank == mesh.world - 1:
        trainee.engine.objective.register_forward_hook(lambda module, given, made: (made[0] * torch.nan, *made[1:]))
    rows = training_order(source, config, 2).rows(trainee.step, mesh.rank, mesh.world)
    log = RunLog(run, 1000.0, CPU, (2, 0), mesh=mesh)
    try:
        train_stage(trainee, source, config, log, Heartbeat(run, mesh, (2, 0)), StopFlag(), lambda: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}", rows.tolist()
    return "trained", rows.tolist()


def test_a_loss_that_is_no_number_on_one_rank_ends_all_and_names_that_ones_particles(ranks, tiny_store, tmp_path):
    config = _configured(tiny_store, Way(2, 1))
    run = _begun(tmp_path / "run", config)
    (first, other_rows), (second, rows) = ranks(_poisoned, 2, 1, run, config)
    assert first.startswith("RunError: stage 2, step 1: the loss is not finite")
    assert second.startswith("ElsewhereError")
    store = ParticleStore.open(tiny_store)
    assert f"rows {(store.source_index[rows[:8]] + 1).tolist()}" in first
    assert str((store.source_index[other_rows[:1]] + 1)[0]) not in first.split("rows [")[1].split("]")[0].split(", ")
