"""The microscope of simulated particles: rows of tables, ranges, what the written files say of it."""

import json
import pickle

import mrcfile
import numpy as np
import pytest
import starfile

from data_prep.convert import prepare
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError
from spire_dist.simulation.ctfs import ctfs_from_table
from spire_dist.simulation.simulate import simulate

SMALL = {"states": 3, "particles": 60, "box": 48, "pixel_size": 8.0, "seed": 1}


def unpickled(path):
    return pickle.loads(path.read_bytes())


def images_of(folder):
    return np.concatenate([mrcfile.read(path) for path in sorted((folder / "images").iterdir())])


def test_ctfs_come_from_the_rows_of_a_table(tmp_path):
    table = np.random.default_rng(0).uniform(1e4, 2e4, (100, 9)).astype(np.float32)
    table[:, :2], table[:, 5:] = (360, 1.34), (300, 2.0, 0.1, 0)
    table[50:, 5:] = (200, 1.4, 0.08, 90)
    np.save(tmp_path / "ctf.npy", table)
    out = simulate(tmp_path / "set", **SMALL, ctf_table=tmp_path / "ctf.npy")
    ctf = unpickled(out / "combined_ctfs.pkl")
    rows = {tuple(row) for row in table[:, 2:].tolist()}
    assert len({tuple(row) for row in ctf[:, 2:].tolist()} & rows) == 60  # without replacement
    star = starfile.read(out / "particles.star")
    assert star["optics"]["rlnVoltage"].tolist() == [200, 300]
    voltages = star["optics"].set_index("rlnOpticsGroup")["rlnVoltage"][star["particles"]["rlnOpticsGroup"]]
    np.testing.assert_array_equal(voltages, ctf[:, 5])
    assert json.loads((out / "simulation.json").read_text())["voltage_kv"] is None


def test_defocus_stays_in_its_range_with_the_astigmatism_asked_for(tmp_path):
    clean = simulate(tmp_path / "set", **SMALL)
    ctf = unpickled(clean / "combined_ctfs.pkl")
    mean = ctf[:, 2:4].mean(axis=1)
    assert mean.min() >= 10000
    assert mean.max() <= 25000
    np.testing.assert_allclose(ctf[:, 2] - ctf[:, 3], 500, atol=0.01)


@pytest.mark.parametrize("content", [None, b"hello", np.zeros((4, 7)), np.full((4, 9), np.nan)])
def test_ctf_table_that_is_none_is_refused(tmp_path, refusal, content):
    path = tmp_path / "ctf.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    refusal(SourceError, ["ctf_table", "ctf.npy"], lambda: simulate(tmp_path / "set", **SMALL, ctf_table=path))


def test_each_state_draws_from_the_whole_table_with_the_voltage_asked_for(tmp_path):
    table = np.random.default_rng(0).uniform(1e4, 2e4, (50, 9)).astype(np.float32)
    np.save(tmp_path / "ctf.npy", table)
    counts = np.array([40, 50, 60])
    ctf = ctfs_from_table(counts, tmp_path / "ctf.npy", 300.0, per_state=True, seed=1)
    distinct = [len(np.unique(rows, axis=0)) for rows in np.split(ctf, np.cumsum(counts)[:-1])]
    assert distinct[:2] == [40, 50]  # without replacement, though 90 of 50 rows
    assert distinct[2] <= 50
    assert set(ctf[:, 3].tolist()) == {300.0}
    rows = {tuple(row) for row in table[:, [2, 3, 4, 6, 7, 8]].tolist()}
    assert {tuple(row) for row in ctf[:, [0, 1, 2, 4, 5, 6]].tolist()} <= rows
    whole = ctfs_from_table(np.array([25, 25]), tmp_path / "ctf.npy", None, per_state=False, seed=1)
    assert len(np.unique(whole, axis=0)) == 50
    np.testing.assert_array_equal(np.sort(whole[:, 3]), np.sort(table[:, 5]))


def test_hidden_envelope_is_in_the_images_and_in_no_table(tmp_path):
    clean = SMALL | {"snr": float("inf"), "pixel_size": 5.0, "shift_a": 0.0}
    plain, hidden, told = (
        simulate(tmp_path / name, **clean, **option)
        for name, option in (("plain", {}), ("hidden", {"hidden_b_factor": 400.0}), ("told", {"b_factor": 400.0}))
    )
    s = np.fft.fftfreq(48, 5.0)
    envelope = np.exp(-400.0 * (s[:, None] ** 2 + s**2) / 4)
    np.testing.assert_allclose(
        np.fft.fft2(images_of(hidden)),
        np.fft.fft2(images_of(plain)) * envelope,
        atol=1e-4 * np.abs(images_of(plain)).sum(),
    )
    np.testing.assert_array_equal(images_of(hidden), images_of(told))
    b_factors = [set(starfile.read(f / "particles.star")["particles"]["rlnCtfBfactor"]) for f in (plain, hidden, told)]
    assert b_factors == [{0.0}, {0.0}, {400.0}]
    assert (plain / "particles.star").read_bytes() == (hidden / "particles.star").read_bytes()
    assert json.loads((hidden / "simulation.json").read_text())["hidden_b_factor"] == 400.0


def test_star_and_pickles_of_the_uncropped_box_make_the_same_store(tmp_path):
    """As released: 128 px at 3 Å with a CTF pickle for 256 px at 1.5 Å."""
    out = simulate(tmp_path / "set", **SMALL, snr_at="before", ctf_box=96)
    ctf = unpickled(out / "combined_ctfs.pkl")
    np.testing.assert_array_equal(np.unique(ctf[:, :2], axis=0), [[96.0, 4.0]])
    (tmp_path / "set/all.txt").write_text("".join(f"images/{state:03d}.mrcs\n" for state in range(3)))
    pickles = {"poses": [out / "combined_poses.pkl"], "ctf": out / "combined_ctfs.pkl"}
    star, both, stacks = (
        ParticleStore.open(prepare(out / source, tmp_path / name, sign="+", shuffle=False, **options))
        for name, source, options in (
            ("star", "particles.star", {}),
            ("both", "particles.star", pickles),
            ("stacks", "all.txt", pickles),
        )
    )
    for store in (both, stacks):
        assert store.pixel_size == pytest.approx(star.pixel_size) == 8.0
        np.testing.assert_allclose(store.rotations, star.rotations, atol=1e-5)
        np.testing.assert_allclose(store.shifts, star.shifts, atol=1e-4)
        np.testing.assert_allclose(store.ctf, star.ctf, rtol=1e-5, atol=1e-5)
