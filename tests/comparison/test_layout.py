"""A set in the benchmark's released layout, without a STAR file, makes the store that the STAR makes."""

import shutil
from pathlib import Path

import numpy as np

from data_prep.convert import prepare
from spire_dist.comparison.layout import find_particles
from spire_dist.data.store import ParticleStore
from spire_dist.errors import SourceError


def test_released_layout_makes_the_store_of_the_star(released: Path, tiny_store: Path, tmp_path: Path):
    files = find_particles(released)
    assert files.particles == released / "images" / "snr1" / "sorted_particles.24.txt"
    assert files.needs_pickles
    assert files.poses is not None
    made = ParticleStore.open(prepare(files.particles, tmp_path / "store", poses=files.poses, ctf=files.ctf, workers=1))
    known = ParticleStore.open(tiny_store)
    mine, theirs = np.argsort(made.source_index), np.argsort(known.source_index)
    np.testing.assert_array_equal(made.stored(mine), known.stored(theirs))
    np.testing.assert_allclose(made.rotations[mine], known.rotations[theirs], atol=1e-5)  # angles of six decimals
    np.testing.assert_allclose(made.shifts[mine], known.shifts[theirs], atol=1e-4)
    np.testing.assert_allclose(made.ctf[mine][:, :7], known.ctf[theirs][:, :7], rtol=1e-5, atol=1e-3)


def test_star_comes_first_and_needs_no_pickles(tiny_truth: Path):
    files = find_particles(tiny_truth)
    assert files.particles == tiny_truth / "particles.star"
    assert not files.needs_pickles
    assert files.poses == tiny_truth / "combined_poses.pkl"  # for others


def test_several_lists_are_refused_until_one_is_named(released: Path, tmp_path: Path, refusal):
    other = shutil.copytree(released / "images" / "snr1", released / "images" / "snr2")
    refusal(SourceError, ["snr1/", "snr2/", "--particles"], lambda: find_particles(released))
    assert find_particles(released, other / "sorted_particles.24.txt").particles.parent == other


def test_what_is_missing_is_named(released: Path, tmp_path: Path, refusal):
    refusal(SourceError, ["nowhere", "no such folder"], lambda: find_particles(tmp_path / "nowhere"))
    refusal(SourceError, ["particles.star", "sorted_particles"], lambda: find_particles(released / "vols"))
    (released / "combined_ctfs.pkl").unlink()
    refusal(SourceError, ["combined_ctfs.pkl"], lambda: find_particles(released))
