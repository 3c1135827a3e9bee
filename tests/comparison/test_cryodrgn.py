"""cryoDRGN as a separate process: a stand-in that knows the truth, and the real one where it is installed."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spire_dist.comparison.cryodrgn import epoch_seconds, load_cryodrgn, train_cryodrgn, whole_epochs
from spire_dist.comparison.layout import find_particles
from spire_dist.comparison.methods import Rival, read_methods
from spire_dist.comparison.programs import find_program, versions
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, RunError, Stopped
from spire_dist.results import fsc
from spire_dist.results.evaluate import score_maps

METHOD = read_methods()["cryodrgn-128x2"]
assert isinstance(METHOD, Rival)


@pytest.fixture
def train(stand_in: Path, tiny_truth: Path, tiny_store: Path, tmp_path: Path):
    """Trains the stand-in in the same run directory at every call; returns the seconds of its epochs."""
    program, store = find_program("cryodrgn", stand_in, threads=1), ParticleStore.open(tiny_store)

    def call(epochs: int = 1, minutes: float | None = None, seed: int = 0, sign: int = 1) -> list[float]:
        files = find_particles(tiny_truth)
        seen = dataclasses.replace(store, attributes=store.attributes | {"sign": {"applied": sign}})
        return train_cryodrgn(program, METHOD, files, seen, tmp_path / "run", seed=seed, epochs=epochs, minutes=minutes)

    return call


def calls(stand_in: Path) -> list[list[str]]:
    return [json.loads(line) for line in (stand_in.parent / "calls.jsonl").read_text().splitlines()]


def test_latents_in_the_order_of_the_input_and_maps_at_them_reach_the_ceiling(
    train, stand_in: Path, tiny_truth: Path, tiny_store: Path, tmp_path: Path
):
    train(2)
    model = load_cryodrgn(find_program("cryodrgn", stand_in, 1), tmp_path / "run", 2, ParticleStore.open(tiny_store))
    result, _ = score_maps(model, tiny_truth, images=20)
    for name in ("per_conformation/model_masked", "per_conformation/model_unmasked", "per_image/model_unmasked"):
        assert result["scores"][name]["mean"] == pytest.approx(fsc.ceiling(24), abs=1e-4)  # maps of float32
    assert result["classes"] == {"states": 4, "adjusted_rand_index": 1.0}
    assert not list((tmp_path / "run").glob(".maps-*"))


def test_it_trains_as_many_whole_epochs_as_fit_by_the_time_of_the_first(train, stand_in: Path):
    assert train(minutes=0.12) == [2.0, 2.0, 2.0]  # 7.2 s
    assert train(minutes=0.12) == [2.0, 2.0, 2.0]
    assert train(minutes=0.01) == [2.0]
    starts = [words for words in calls(stand_in) if words[0] == "train_vae"]
    assert len(starts) == 2  # what is there is used
    for words in starts:
        assert "--uninvert-data" not in words  # bright protein is what it takes for granted
        assert words[words.index("--enc-dim") + 1] == "128"


def test_dark_protein_is_told(train, stand_in: Path):
    train(sign=-1)
    assert "--uninvert-data" in calls(stand_in)[0]


def test_a_checkpoint_cut_short_is_made_again(train, stand_in: Path, tmp_path: Path):
    train(3)
    whole = (tmp_path / "run" / "z.3.pkl").read_bytes()
    (tmp_path / "run" / "z.3.pkl").write_bytes(whole[:200])
    assert whole_epochs(tmp_path / "run") == 2
    assert len(train(3)) == 3
    assert (tmp_path / "run" / "z.3.pkl").read_bytes() == whole
    assert calls(stand_in)[-1][-1].endswith("weights.2.pkl")


def test_other_settings_are_refused_and_a_failure_is_told_with_its_last_word(train, stand_in: Path, refusal):
    train()
    refusal(RunError, ["seed 0", "now 1"], lambda: train(seed=1))
    (stand_in.parent / "fail").touch()
    refusal(RunError, ["log.txt", "train_vae failed (1)", "out of memory"], lambda: train(2))


def test_a_request_to_stop_ends_the_process_too_and_the_same_call_goes_on(train, stand_in: Path, tmp_path: Path):
    hang = stand_in.parent / "hang"
    hang.touch()

    def stop() -> None:
        while not (tmp_path / "run" / "z.1.pkl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match="the same command goes on"):
        train(3)
    thread.join()
    assert not (tmp_path / "run" / "z.2.pkl").exists()
    hang.unlink()
    assert len(train(3)) == 3
    assert calls(stand_in)[-1][-1].endswith("weights.1.pkl")


def test_a_process_that_outlived_its_caller_keeps_others_out(train, tmp_path: Path, refusal):
    (tmp_path / "run").mkdir()
    with (
        open(tmp_path / "run" / ".lock", "a") as lock,
        subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),)) as orphan,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.close()  # as a kill would
        refusal(RunError, ["at work here"], train)
        orphan.kill()
    assert train() == [2.0]


def test_python_without_cryodrgn_is_told_how_to_get_it(refusal):
    refusal(
        ConfigError, [sys.executable, "pip install cryodrgn==4.3.1"], lambda: versions("cryodrgn", Path(sys.executable))
    )


def test_epoch_seconds_are_read_from_the_log():
    log = """\
(INFO) (train_vae.py) (23-Nov-2026 01:54:49) # [Train Epoch: 1/2] [112/250 particles] gen loss=0.705514, kld=0.259188
(INFO) (train_vae.py) (23-Nov-2026 01:54:52) # =====> Epoch: 1 Average gen loss = 0.705713, KLD = 0.230297, total loss = \
0.705731; Finished in 0:00:05.804923
(INFO) (train_vae.py) (23-Nov-2026 01:54:52) Evaluating z
(INFO) (train_vae.py) (23-Nov-2026 01:54:57) # =====> Epoch: 2 Average gen loss = 0.681827, KLD = 0.409592, total loss = \
0.681859; Finished in 1:02:03
(INFO) (train_vae.py) (23-Nov-2026 01:54:58) Finished in 0:00:13.312628 (0:00:06.656314 per epoch)
"""
    assert epoch_seconds(log) == {1: 5.804923, 2: 3723.0}


@pytest.mark.slow
@pytest.mark.skipif("CRYODRGN_PYTHON" not in os.environ, reason="CRYODRGN_PYTHON names no environment with cryoDRGN")
def test_the_real_one_finds_the_molecule_with_the_right_sign_and_orientation(
    tiny_truth: Path, tiny_store: Path, tmp_path: Path
):
    program, store = (
        find_program("cryodrgn", Path(os.environ["CRYODRGN_PYTHON"]), threads=1),
        ParticleStore.open(tiny_store),
    )
    files, run = find_particles(tiny_truth), tmp_path / "run"
    assert len(train_cryodrgn(program, METHOD, files, store, run, seed=0, epochs=4, minutes=None)) == 4
    result, _ = score_maps(load_cryodrgn(program, run, 4, store), tiny_truth, images=0)
    # 0.36 was measured; a map against its negative has 0.5 / 24 = 0.02, one that lies otherwise some 0.1
    assert result["scores"]["per_conformation/model_unmasked"]["mean"] > 0.3
