"""RECOVAR as a separate process: a stand-in that knows the truth, and the real one where it is installed."""

import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spire_dist.comparison.layout import find_particles
from spire_dist.comparison.methods import Rival, read_methods
from spire_dist.comparison.programs import find_program
from spire_dist.comparison.recovar import load_recovar, train_recovar
from spire_dist.data.store import ParticleStore
from spire_dist.errors import RunError, SourceError, Stopped
from spire_dist.maps import read_map
from spire_dist.results import fsc
from spire_dist.results.evaluate import score_maps
from spire_dist.results.truth import open_truth

METHODS = {name: method for name, method in read_methods().items() if isinstance(method, Rival)}
METHOD = METHODS["recovar"]


@pytest.fixture
def train(recovar: Path, tiny_truth: Path, tiny_store: Path, tmp_path: Path):
    """Runs the stand-in in a run directory, by default the same at every call; returns the seconds it took."""
    program, store = find_program("recovar", recovar, threads=1), ParticleStore.open(tiny_store)

    def call(data: Path = tiny_truth, seed: int = 0, run: str = "run") -> float:
        truth, files = open_truth(tiny_truth, store.box, store.pixel_size), find_particles(data)
        return train_recovar(program, METHOD, files, truth, store, tmp_path / run, seed=seed)

    return call


def calls(recovar: Path) -> list[list[str]]:
    return [json.loads(line) for line in (recovar.parent / "calls.jsonl").read_text().splitlines()]


def test_latents_in_the_order_of_the_input_and_maps_at_them_reach_the_ceiling(
    train, recovar: Path, tiny_truth: Path, tiny_store: Path, tmp_path: Path
):
    seconds = train()
    assert train() == seconds  # what is there is used
    model = load_recovar(find_program("recovar", recovar, 1), tmp_path / "run", ParticleStore.open(tiny_store))
    result, _ = score_maps(model, tiny_truth, images=20)
    for name in ("per_conformation/model_masked", "per_image/model_unmasked"):
        assert result["scores"][name]["mean"] == pytest.approx(fsc.ceiling(24), abs=1e-4)  # maps of float32
    assert result["classes"] == {"states": 4, "adjusted_rand_index": 1.0}
    assert [words[0] for words in calls(recovar)] == ["pipeline", "compute_state", "compute_state"]


def test_it_is_given_the_stacks_the_mask_of_the_set_and_halves_that_the_seed_decides(
    train, recovar: Path, tiny_truth: Path, tmp_path: Path
):
    for seed in (0, 1):
        train(seed=seed, run=f"run{seed}")
    words = calls(recovar)[0]
    assert Path(words[words.index("--datadir") + 1]) == (tiny_truth / "images").resolve()
    given, _ = read_map(Path(words[words.index("--mask") + 1]))
    np.testing.assert_array_equal(given, read_map(tiny_truth / "init_mask" / "mask.mrc")[0])
    halves = [pickle.loads((tmp_path / f"run{seed}" / "halfsets.pkl").read_bytes()) for seed in (0, 1)]
    count = len(pickle.loads((tiny_truth / "combined_ctfs.pkl").read_bytes()))
    for first, second in halves:
        np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(count))
        assert abs(len(first) - len(second)) <= 1
    assert list(halves[0][0]) != list(halves[1][0])


def test_a_failure_is_told_other_settings_refused_and_a_broken_result_made_again(
    train, recovar: Path, tmp_path: Path, refusal
):
    (recovar.parent / "fail").touch()
    refusal(RunError, ["log.txt", "pipeline failed (1)", "out of memory"], train)
    (recovar.parent / "fail").unlink()
    (tmp_path / "run" / "result" / "model").mkdir(parents=True)  # as a killed one leaves it
    train()
    refusal(RunError, ["seed 0", "now 1"], lambda: train(seed=1))


def test_maps_that_were_made_before_it_was_stopped_are_not_made_again(
    train, recovar: Path, tiny_truth: Path, tiny_store: Path, tmp_path: Path
):
    train()
    model = load_recovar(find_program("recovar", recovar, 1), tmp_path / "run", ParticleStore.open(tiny_store))
    points = np.eye(4, dtype=np.float32)[[2, 0, 2, 3]]
    hang, states = recovar.parent / "hang", tmp_path / "run" / "states"
    hang.touch()

    def stop() -> None:
        while not list((tmp_path / "run").glob(".maps-*/maps/vol0000/params.pkl")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match="the same command goes on"):
        list(model.volumes(points))
    thread.join()
    hang.unlink()
    [first] = states.iterdir()
    before = first.stat()
    maps = list(model.volumes(points))
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(list(states.iterdir())) == 3  # one is wanted twice
    for state, found in zip((2, 0, 2, 3), maps, strict=True):
        np.testing.assert_array_equal(found, read_map(tiny_truth / "vols" / "24_org" / f"{state:03d}.mrc")[0])


def test_stacks_in_several_folders_and_missing_pickles_are_refused(train, tiny_truth: Path, tmp_path: Path, refusal):
    data = tmp_path / "data"
    data.mkdir()
    text = (tiny_truth / "particles.star").read_text()
    (data / "particles.star").write_text(text)
    refusal(SourceError, ["particles.star", "combined_poses.pkl", "RECOVAR needs them"], lambda: train(data))
    (data / "particles.star").write_text(text.replace("@images/000", "@elsewhere/000"))
    for name in ("combined_poses.pkl", "combined_ctfs.pkl"):
        (data / name).symlink_to(tiny_truth / name)
    refusal(SourceError, ["particles.star", "2 folders"], lambda: train(data))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles for minutes, and takes one to two for a map
@pytest.mark.skipif("RECOVAR_PYTHON" not in os.environ, reason="RECOVAR_PYTHON names no environment with RECOVAR")
@pytest.mark.parametrize("name", ["recovar", "recovar-small"])
def test_the_real_one_finds_the_molecule_with_the_right_sign_and_orientation(
    name: str, tiny_truth: Path, tiny_store: Path, tmp_path: Path, monkeypatch
):
    # with more, its batches of images as small as these do not fit into memory
    monkeypatch.setattr("spire_dist.comparison.recovar.CPU_GB", 1)
    program, store = (
        find_program("recovar", Path(os.environ["RECOVAR_PYTHON"]), threads=1),
        ParticleStore.open(tiny_store),
    )
    truth = open_truth(tiny_truth, store.box, store.pixel_size)
    run = tmp_path / "run"
    assert train_recovar(program, METHODS[name], find_particles(tiny_truth), truth, store, run, seed=0) > 0
    result, _ = score_maps(load_recovar(program, run, store), tiny_truth, images=0)
    assert result["scores"]["per_conformation/model_unmasked"]["mean"] > 0.3
