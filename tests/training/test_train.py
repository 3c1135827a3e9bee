"""Whole runs of both stages: what they write, what they learn, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import starfile
import torch
from scipy.ndimage import zoom

from data_prep.convert import prepare
from spire_dist.config import load_config
from spire_dist.data.blocks import local_blocks
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.holder import sole_trainer
from spire_dist.errors import ConfigError, RunError, SourceError, StoreError
from spire_dist.maps import read_map, write_map
from spire_dist.physics.projector import render_volume
from spire_dist.training.run import load_run
from spire_dist.training.train import train


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run) -> dict:
    return json.loads((run / "STATUS.json").read_text())


def contents(run) -> dict[str, bytes]:
    """Every file but the one that says when it was last looked at."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "STATUS.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_run_leaves_the_files_it_promises(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"config.toml", "command.txt", "environment.json", "STATUS.json", "metrics.jsonl", "latest", "latents.npy",
                "parts.npy", "volumes/consensus.mrc", "volumes/consensus_half1.mrc", "volumes/consensus_half2.mrc",
                "stage1/latents.npy", "stage1/parts.npy", "stage1/latest"}  # fmt: skip
    assert expected <= files
    assert any(name.startswith("tb/") for name in files)
    assert not [name for name in files if "partial" in name]
    assert (finished / "checkpoints" / (finished / "latest").read_text().strip() / "COMMIT").exists()
    found = status(finished)
    assert (found["state"], found["stage"], found["step"]) == ("complete", 2, 24)


def test_latents_and_parts_have_a_row_per_particle_and_gaussian(finished):
    for folder, gaussians in ((finished, 96), (finished / "stage1", 64)):
        latents, parts = np.load(folder / "latents.npy"), np.load(folder / "parts.npy")
        assert latents.shape == (240, 2)
        assert latents.dtype == np.float32
        assert np.isfinite(latents).all()
        assert np.ptp(latents, axis=0).min() > 0
        assert parts.shape == (gaussians,)
        assert set(np.unique(parts)) <= {0, 1, 2}


def test_every_metrics_line_has_all_its_keys_and_the_loss_falls(finished):
    records = metrics(finished)
    keys = {
        "stage",
        "step",
        "epoch",
        "loss",
        "images_per_s",
        "wait_share",
        "collective_share",
        "memory_gib",
        "elapsed_s",
        "total",
        "left_s",
        "time",
    }
    assert all(set(record) == keys for record in records)
    assert [r["step"] for r in records if r["stage"] == 1][-1] == 40
    assert [r["step"] for r in records if r["stage"] == 2][-1] == 24
    elapsed = [record["elapsed_s"] for record in records]
    assert elapsed == sorted(elapsed)
    first, last = records[0]["loss"], np.mean([r["loss"] for r in records if r["stage"] == 2][-3:])
    assert last < first - 0.08


def test_a_finished_run_reads_back_as_it_was_trained(finished):
    for stage, count in ((1, 64), (2, 96)):
        run = load_run(finished, stage=stage if stage == 1 else None)
        assert (run.stage, run.box, run.pixel_size, len(run.parts), len(run.widths)) == (stage, 24, 16.0, count, count)
        centres, amplitudes = run.decode(run.latents[:3])
        assert centres.shape == (3, count, 3)
        assert np.abs(centres).max() < 24 * 16
        expected = render_volume(*map(torch.from_numpy, (centres[1], amplitudes[1], run.widths)), 24, 16.0)
        np.testing.assert_allclose(run.volume(run.latents[1]), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_model_looks_like_the_truth(finished, tiny_truth):
    run = load_run(finished)
    maps = [read_map(path)[0] for path in sorted((tiny_truth / "vols" / "24_org").glob("*.mrc"))]
    found = run.volume(run.latents.mean(axis=0))
    assert np.corrcoef(found.ravel(), np.mean(maps, axis=0).ravel())[0, 1] > 0.85


def test_a_finished_run_says_so_and_changes_nothing(finished_table, train_tiny, capsys):
    before = contents(finished_table)
    train_tiny(finished_table)
    assert "complete" in capsys.readouterr().out
    assert contents(finished_table) == before


def test_a_run_killed_between_its_last_result_and_its_status_ends_complete(finished_table, tmp_path, train_tiny):
    run = tmp_path / "run"
    shutil.copytree(finished_table, run)
    (run / "STATUS.json").write_text(json.dumps(status(run) | {"state": "training"}))
    train_tiny(run)
    assert status(run)["state"] == "complete"


def test_the_same_seed_gives_the_same_bits_and_another_one_others(finished_table, tmp_path, train_tiny):
    again, other = train_tiny(tmp_path / "again"), train_tiny(tmp_path / "other", "seed=1")
    for name in ("latents.npy", "parts.npy", "stage1/latents.npy"):
        assert (again / name).read_bytes() == (finished_table / name).read_bytes()
    assert (other / "latents.npy").read_bytes() != (finished_table / "latents.npy").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_from_disk_trains_to_the_same_bits(finished_table, tmp_path, train_tiny, workers):
    run = train_tiny(tmp_path / "run", "data.resident='never'", f"data.workers={workers}")
    assert (run / "latents.npy").read_bytes() == (finished_table / "latents.npy").read_bytes()


def test_blocks_from_elsewhere_train_to_the_same_bits(finished_table, tmp_path, tiny_settings, tiny_store):
    asked = []

    def blocks(order, rank, world, first):
        asked.append((rank, world, first))
        return local_blocks(ParticleStore.open(tiny_store), 0, order, rank, world, first)

    train(load_config(overrides=[*tiny_settings, "data.loader='ray'"]), tmp_path / "run", blocks)
    assert asked == [(0, 1, 0), (0, 1, 0)]  # once in each stage
    assert (tmp_path / "run" / "latents.npy").read_bytes() == (finished_table / "latents.npy").read_bytes()


def test_ray_without_its_readers_is_refused_before_anything_is_written(tmp_path, train_tiny, refusal):
    refusal(
        ConfigError,
        ["data.loader = ray", "cluster.ray_loader"],
        lambda: train_tiny(tmp_path / "run", "data.loader='ray'"),
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "key", "old"),
    [("stage1.epochs=6", "stage1.epochs", "5"), ("seed=4", "seed", "0"), ("latent.dimension=3", "latent.dimension", "2"),
     ("stage2.rates.widths=0.5", "stage2.rates", "0.01"), ("latent.kind='encoder'", "latent.kind", "table")],
)  # fmt: skip
def test_another_configuration_on_the_same_run_is_refused_by_key(
    finished_table, train_tiny, refusal, setting, key, old
):
    before = contents(finished_table)
    words = [key, old, str(finished_table), "new --run"]
    refusal(ConfigError, words, lambda: train_tiny(finished_table, setting))
    assert contents(finished_table) == before


def test_settings_that_change_no_result_may_change(finished_table, train_tiny):
    train_tiny(finished_table, "output.keep=5", "threads=2", "data.resident='never'")


def test_other_particles_on_the_same_run_are_refused(finished_table, tiny_truth, tmp_path, train_tiny, refusal):
    other = prepare(tiny_truth / "particles.star", tmp_path / "other", sign="+", seed=5)
    words = [str(finished_table), str(other), "fingerprint", "new --run"]
    refusal(RunError, words, lambda: train_tiny(finished_table, f"data.store='{other}'"))


def test_a_store_that_has_moved_is_the_same_store(finished_table, tiny_store, tmp_path, train_tiny):
    run, store = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished_table, run)
    shutil.copytree(tiny_store, store)
    train_tiny(run, f"data.store='{store}'")
    assert load_run(run).store.path == store


def test_other_particles_under_the_same_name_are_refused(tiny_store, tiny_truth, tmp_path, train_tiny, refusal):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    settings = (f"data.store='{store}'", "stage1.epochs=0.2", "stage2.epochs=0.2")
    run = train_tiny(tmp_path / "run", *settings)
    shutil.rmtree(store)
    prepare(tiny_truth / "particles.star", store, sign="+", seed=5)
    refusal(RunError, [str(run), str(store), "fingerprint"], lambda: train_tiny(run, *settings))


def test_a_store_without_poses_is_refused(tmp_path, write_particles, train_tiny, refusal):
    source = write_particles(tmp_path / "in")
    tables = starfile.read(source)
    tables["particles"] = tables["particles"].drop(columns=["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"])
    starfile.write(tables, source, overwrite=True)
    store = prepare(source, tmp_path / "store", allow_missing_poses=True)
    words = [str(store), "without poses"]
    refusal(ConfigError, words, lambda: train_tiny(tmp_path / "run", f"data.store='{store}'"))
    assert not (tmp_path / "run").exists()


def test_a_pixel_that_is_not_a_number_names_its_particle(tiny_store, tmp_path, train_tiny, refusal):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    shard = store / "images" / "c" / "1" / "0" / "0"
    raw = bytearray(shard.read_bytes())
    pixel = (11 * 24 * 24 + 300) * 2
    raw[pixel : pixel + 2] = np.float16(np.nan).tobytes()
    shard.write_bytes(bytes(raw))
    particles = ParticleStore.open(store)
    assert np.isnan(particles.read(np.array([75]))).sum() == 1
    row = f"row {particles.source_index[75] + 1};"
    for resident in ("never", "always"):
        run, settings = tmp_path / f"run-{resident}", [f"data.store='{store}'", f"data.resident='{resident}'"]
        refusal(StoreError, [str(store), row], lambda run=run, settings=settings: train_tiny(run, *settings))
        assert status(run)["state"] == "failed"
        assert row in status(run)["message"]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(tmp_path, tiny_truth, train_tiny, refusal):
    settings = [f"stage1.rates.{name}=1e30" for name in ("centres_px", "widths", "amplitudes", "networks")]
    words = ["stage 1", "not finite", "rows [", f"of {tiny_truth / 'particles.star'}", "stage1.rates"]
    refusal(RunError, words, lambda: train_tiny(tmp_path / "run", *settings, "stage1.warmup_epochs=0"))
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_given_map_of_another_size_starts_the_run(tmp_path, tiny_truth, train_tiny):
    average = np.mean([read_map(path)[0] for path in (tiny_truth / "vols" / "24_org").glob("*.mrc")], axis=0)
    write_map(tmp_path / "map.mrc", zoom(average, 1.5, grid_mode=True, mode="grid-constant"), 16.0 / 1.5)
    run = train_tiny(tmp_path / "run", f"consensus.map='{tmp_path}/map.mrc'")
    volume, pixel_size = read_map(run / "volumes" / "consensus.mrc")
    assert volume.shape == (24, 24, 24)
    assert pixel_size == pytest.approx(16.0)
    assert status(run)["state"] == "complete"


@pytest.mark.parametrize("kind", ["missing", "not a map"])
def test_a_wrong_map_is_named_and_the_run_can_be_started_with_the_right_one(
    tmp_path, tiny_truth, train_tiny, refusal, kind
):
    wrong = tmp_path / "wrong.mrc"
    if kind == "not a map":
        wrong.write_text("no map")
    settings = ("stage1.epochs=0.2", "stage2.epochs=0.2")
    refusal(SourceError, [str(wrong)], lambda: train_tiny(tmp_path / "run", f"consensus.map='{wrong}'", *settings))
    right = tiny_truth / "vols" / "24_org" / "000.mrc"
    train_tiny(tmp_path / "run", f"consensus.map='{right}'", *settings)


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path, train_tiny, refusal):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        refusal(RunError, [str(run), "choose"], lambda run=run: train_tiny(run))
    (tmp_path / "run" / "command.txt").mkdir(parents=True)  # stands for any file that cannot be written
    refusal(RunError, [str(tmp_path / "run"), "choose"], lambda: train_tiny(tmp_path / "run"))


def test_a_machine_without_cuda_says_so(tmp_path, train_tiny, refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(ConfigError, ["device = cuda", "auto or cpu"], lambda: train_tiny(tmp_path / "run", "device='cuda'"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_store_is_refused_before_anything_is_written(tmp_path, refusal):
    config = load_config(overrides=[f"data.store='{tmp_path}/none'"])
    refusal(StoreError, ["none", "not a particle store"], lambda: train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_finished_run_is_refused(tmp_path, refusal):
    refusal(RunError, [str(tmp_path), "not a run directory"], lambda: load_run(tmp_path))
    (tmp_path / "config.toml").write_text("")
    refusal(RunError, [str(tmp_path), "has not ended"], lambda: load_run(tmp_path))


@pytest.mark.parametrize("settings", [
    ("stage1.gaussians=1", "parts.clusters=5"), ("stage1.batch=1000", "stage2.batch=1000"), ("latent.dimension=1",),
    ("stage2.gaussians=1",), ("parts.anchors=64",), ("stage1.warmup_epochs=50",), ("stage1.epochs=0.01",),
    ("stage2.epochs=0.01",), ("stage2.distil_steps=0",),
])  # fmt: skip
def test_odd_settings_still_make_a_run(tmp_path, train_tiny, settings):
    short = ("stage1.epochs=0.3", "stage2.epochs=0.3")
    run = train_tiny(tmp_path / "run", *short, *settings)
    assert status(run)["state"] == "complete"
    assert np.isfinite(np.load(run / "latents.npy")).all()


def test_a_second_process_on_the_same_run_directory_is_refused(tiny_store, tiny_settings, tmp_path, refusal):
    config = load_config(overrides=tiny_settings)
    tmp_path.joinpath("run").mkdir()
    with sole_trainer(tmp_path / "run"):
        refusal(RunError, ["run", "another process trains here"], lambda: train(config, tmp_path / "run"))


def test_the_projector_of_the_settings_is_the_one_that_trains(train_tiny, finished_table, tmp_path, capsys):
    """The dense sum sees the same particles as the local splat, to what a cut at 4 σ costs."""
    run = train_tiny(tmp_path / "run", "projector='torch'")
    assert "projector torch" in capsys.readouterr().out
    local, dense = (metrics(folder)[-1]["loss"] for folder in (finished_table, run))
    assert dense == pytest.approx(local, rel=0.05)
    local, dense = (np.load(folder / "latents.npy") for folder in (finished_table, run))
    assert not np.array_equal(dense, local)


def test_a_projector_that_cannot_run_here_is_refused_before_anything_is_written(train_tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"projector = triton: cannot take torch.float32 on cpu"):
        train_tiny(tmp_path / "run", "projector='triton'", "device='cpu'")
    assert not (tmp_path / "run").exists()
