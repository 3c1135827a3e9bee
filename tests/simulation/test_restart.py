"""A simulation that is cut off goes on, and ends with the bytes of one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from spire_dist.errors import ConfigError, Stopped
from spire_dist.simulation import folder
from spire_dist.simulation.simulate import simulate

SETTINGS = {"states": 3, "particles": 1700, "box": 24, "pixel_size": 16.0, "shift_a": 10.0, "seed": 5, "device": "cpu"}
"""Nine chunks: three in each state."""
SLOW = """
import json, sys, time
from pathlib import Path
from spire_dist.simulation import folder, simulate
put = folder.put_images
def slowly(*words):
    put(*words)
    time.sleep(0.25)
folder.put_images = slowly
simulate.simulate(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""


def hashes(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return hashes(simulate(tmp_path_factory.mktemp("undisturbed") / "set", **SETTINGS))


def lines(place):
    log = place / "progress.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def noisy_stacks(place):
    return len(list((place / "set/images").glob("[0-9]*.mrcs")))


def started(out, reached):
    """A process that simulates slowly, as far as `reached` of its workplace says."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(out), json.dumps(SETTINGS)], env=dict(os.environ))
    place, end = out.with_name(f".{out.name}.partial"), time.monotonic() + 120
    while not reached(place):
        assert process.poll() is None, "it ended before it could be cut off"
        assert time.monotonic() < end, "it does not get there"
        time.sleep(0.02)
    return process, place


@pytest.mark.parametrize(
    "reached",
    [lambda place: lines(place) >= 4, lambda place: noisy_stacks(place) >= 1],
    ids=["in the signal", "in the noise"],
)
def test_killed_simulation_goes_on_and_ends_with_the_same_bytes(tmp_path, undisturbed, refusal, reached):
    out = tmp_path / "set"
    process, place = started(out, reached)
    try:
        refusal(ConfigError, [str(out), "another process"], lambda: simulate(out, **SETTINGS))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    words = [str(place), "snr = 0.1", "0.2", "remove the folder"]
    refusal(ConfigError, words, lambda: simulate(out, **SETTINGS, snr=0.2))
    kept = {p: p.stat().st_mtime_ns for p in (place / "set/vols").rglob("*.mrc")}
    before = lines(place)
    assert before >= 4
    simulate(out, **SETTINGS)
    assert hashes(out) == undisturbed
    assert list(tmp_path.iterdir()) == [out]
    moved = [out / p.relative_to(place / "set") for p in kept]
    assert [p.stat().st_mtime_ns for p in moved] == list(kept.values())  # what was there was not made again


def test_line_that_was_cut_off_is_not_believed(tmp_path, undisturbed):
    out = tmp_path / "set"
    process, place = started(out, lambda place: lines(place) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with open(place / "progress.jsonl", "a") as file:
        file.write("[147456, 12.")
    simulate(out, **SETTINGS)
    assert hashes(out) == undisturbed


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, undisturbed, refusal, monkeypatch):
    out, put, calls = tmp_path / "set", folder.put_images, []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 5:
            raise KeyboardInterrupt
        put(*words)

    monkeypatch.setattr(folder, "put_images", interrupted)
    refusal(Stopped, [".set.partial", "goes on"], lambda: simulate(out, **SETTINGS))
    assert lines(tmp_path / ".set.partial") == 4
    simulate(out, **SETTINGS)
    assert len(calls) == 5 + 5 + 9  # one chunk twice, then the noise
    assert hashes(out) == undisturbed


def test_rest_of_a_finished_set_is_not_gone_on_with(tmp_path, undisturbed):
    """Killed after the set got its name and before its workplace was removed; then the set was deleted."""
    place = tmp_path / ".set.partial"
    place.mkdir()
    (place / "settings.json").write_text("{}")
    (place / "progress.jsonl").write_text("[1, 2.0, 3.0]\n" * 9)
    assert hashes(simulate(tmp_path / "set", **SETTINGS)) == undisturbed
    assert not place.exists()


def test_changed_input_file_is_refused(tmp_path, refusal, monkeypatch):
    table = tmp_path / "ctf.npy"
    np.save(table, np.full((10, 9), 1e4))
    monkeypatch.setattr(folder, "put_images", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Stopped):
        simulate(tmp_path / "set", **SETTINGS, ctf_table=table)
    np.save(table, np.full((10, 9), 2e4))
    words = [".set.partial", "contents of the input files", "remove the folder"]
    refusal(ConfigError, words, lambda: simulate(tmp_path / "set", **SETTINGS, ctf_table=table))


def test_number_of_threads_does_not_matter(tmp_path, undisturbed):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert hashes(simulate(tmp_path / "set", **SETTINGS)) == undisturbed
    finally:
        torch.set_num_threads(threads)
