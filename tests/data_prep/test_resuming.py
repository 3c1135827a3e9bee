"""Prep killed, interrupted, disturbed or asked for twice: it goes on, ends in the same bytes and harms nothing."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from data_prep import convert
from data_prep.convert import prepare
from data_prep.plan import with_sign
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError, SourceError, StoreError


def _contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _edited(star: Path, block: str, **columns) -> Path:
    blocks = starfile.read(star, always_dict=True)
    blocks[block] = blocks[block].assign(**columns)
    path = star.with_name("edited.star")
    starfile.write(blocks, path)
    return path


PREP = """
import sys
from pathlib import Path
from data_prep.convert import prepare
prepare(Path(sys.argv[1]), Path(sys.argv[2]), images_per_shard=64, workers=2)
"""


@pytest.mark.parametrize("shards_before_the_kill", [0, 3])
def test_a_killed_prep_goes_on_and_ends_in_the_same_bytes(tmp_path, write_particles, shards_before_the_kill):
    source = write_particles(tmp_path / "in", count=1500, box=64, per_stack=500)
    expected = prepare(source, tmp_path / "whole", images_per_shard=64)
    store = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", PREP, source, store], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((store / ".prep").glob("*"))) < shards_before_the_kill or not store.exists():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (store / "manifest.json").exists()
    noted = {path: path.stat().st_mtime_ns for path in (store / ".prep").glob("shard-*.json")}
    (store / "images/c/20/0").mkdir(parents=True, exist_ok=True)
    (store / "images/c/20/0/.0.elsewhere-17.partial").write_bytes(b"what a killed write leaves")
    prepare(source, store, images_per_shard=64)
    assert all(path.stat().st_mtime_ns == written for path, written in noted.items())  # not made again
    assert _contents(store) == _contents(expected)


def test_an_interrupted_prep_says_how_far_it_came_and_goes_on(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=1500, box=64, per_stack=500)
    store = tmp_path / "store"
    words = [source, store, "--images-per-shard", 64, "--workers", 2]
    command = [sys.executable, "-m", "spire_dist.cli", "prep", *map(str, words)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )
    deadline = time.monotonic() + 120
    while not list((store / ".prep").glob("shard-*")):
        assert process.poll() is None, "finished before it could be interrupted"
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 75
    assert re.fullmatch(
        r"spire-dist: .*/store: stopped with \d+ of 24 shards made; the same command goes on", errors[-1]
    )
    assert not any("Traceback" in line for line in errors)
    subprocess.run(command, check=True, capture_output=True)
    assert _contents(store) == _contents(prepare(source, tmp_path / "whole", images_per_shard=64))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_a_shard_whose_note_is_damaged_is_made_again(tmp_path, write_particles, damage):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store", images_per_shard=64)
    before = _contents(store)
    (store / ".prep/shard-000001.json").write_bytes(damage)
    (store / "manifest.json").unlink()
    prepare(source, store, images_per_shard=64)
    assert _contents(store) == before


@pytest.mark.parametrize("name", ["ctf/c/0/0", "rotations/zarr.json", "stacks.json"])
@pytest.mark.parametrize("damage", ["zeros", "gone"])
def test_a_store_whose_tables_were_damaged_does_not_go_on(tmp_path, write_particles, refusal, name, damage):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store", images_per_shard=64)
    (store / "manifest.json").unlink()
    (store / name).unlink() if damage == "gone" else (store / name).write_bytes(bytes((store / name).stat().st_size))
    refusal(StoreError, [str(store), "damaged", "delete"], lambda: prepare(source, store, images_per_shard=64))
    assert not (store / "manifest.json").exists()


def test_what_came_to_stand_at_the_place_of_a_store_meanwhile_stays(tmp_path, write_particles, refusal, monkeypatch):
    source, store = write_particles(tmp_path / "in"), tmp_path / "store"

    def while_planning(plan):
        (store / "somebody").mkdir(parents=True)
        (store / "somebody/notes.txt").write_text("precious")
        return with_sign(plan)

    monkeypatch.setattr(convert, "with_sign", while_planning)
    refusal(StoreError, [str(store), "cannot be written"], lambda: prepare(source, store))
    assert (store / "somebody/notes.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "store"]


def test_a_link_to_a_folder_is_followed(tmp_path, write_particles):
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    prepare(write_particles(tmp_path / "in"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "large/manifest.json").is_file()


def test_the_working_folder_can_become_a_store(tmp_path, write_particles, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare(write_particles(tmp_path / "in"), Path("."))
    assert ParticleStore.open(tmp_path / "here").count == 150


def test_a_store_that_another_call_began_stays_when_an_image_is_refused(tmp_path, write_particles, refusal):
    source, store = write_particles(tmp_path / "in"), tmp_path / "store"
    prepare(source, store, only_begin=True)
    stack = source.parent / "stacks/part00.mrcs"
    stack.write_bytes(stack.read_bytes()[:1024] + bytes(stack.stat().st_size - 1024))
    refusal(SourceError, ["flat background"], lambda: prepare(source, store))
    assert (store / "zarr.json").is_file()


def test_two_preps_of_one_store_at_once_end_in_the_same_bytes(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=1000, box=64, per_stack=500)
    expected = _contents(prepare(source, tmp_path / "whole", images_per_shard=64))
    prepare(source, tmp_path / "store", images_per_shard=64, only_begin=True)
    both = [
        subprocess.Popen([sys.executable, "-c", PREP, source, tmp_path / "store"], stderr=subprocess.PIPE) for _ in "ab"
    ]
    for process in both:
        assert process.wait(120) == 0, process.stderr.read().decode()
    assert _contents(tmp_path / "store") == expected


def test_workers_must_be_some(tmp_path, write_particles, refusal):
    source = write_particles(tmp_path / "in")
    refusal(ConfigError, ["workers", "-3"], lambda: prepare(source, tmp_path / "store", workers=-3))


def test_a_half_written_shard_is_made_again(tmp_path, write_particles):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store", images_per_shard=64)
    before = _contents(store)
    shard = store / "images/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:1000])
    (store / "manifest.json").unlink()
    prepare(source, store, images_per_shard=64)
    assert _contents(store) == before


def test_a_finished_store_is_left_alone(tmp_path, write_particles):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store")
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert prepare(source, store) == store
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == times


def test_the_number_of_threads_does_not_change_a_byte(tmp_path, write_particles):
    source = write_particles(tmp_path / "in", count=400, box=32)
    one, many = (prepare(source, tmp_path / f"{n}", box=24, images_per_shard=128, workers=n) for n in (1, 7))
    assert _contents(one) == _contents(many)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box": 8}, ["box = None", "now 8"]),
        ({"seed": 1}, ["seed = 0", "now 1"]),
        ({"sign": "-"}, ["sign = auto", "now -"]),
        ({"radius_a": 9.0}, ["radius_a = None", "now 9.0"]),
        ({"dtype": "float32"}, ["dtype = float16", "now float32"]),
    ],
)
def test_other_options_for_a_store_that_was_begun_are_refused_by_name(
    tmp_path, write_particles, refusal, change, words
):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store")
    refusal(StoreError, [str(store), *words], lambda: prepare(source, store, **change))


@pytest.mark.parametrize("finished", [True, False])
def test_another_source_for_a_store_that_was_begun_is_refused_by_name(tmp_path, write_particles, refusal, finished):
    source = write_particles(tmp_path / "in")
    store = prepare(source, tmp_path / "store")
    if not finished:
        (store / "manifest.json").unlink()
    other = _edited(source, "particles", rlnDefocusU=15000.0)
    refusal(StoreError, [str(other), "particles file", str(store)], lambda: prepare(other, store))
    with mrcfile.open(source.parent / "stacks/part01.mrcs", mode="r+") as mrc:
        mrc.set_data(np.concatenate([mrc.data, mrc.data[:1]]))
    refusal(StoreError, ["part01.mrcs", "stack file"], lambda: prepare(source, store))
