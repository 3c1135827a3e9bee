"""Scores and part agreement of a stand-in whose truth is itself, so that every number is known beforehand."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from spire_dist.errors import ConfigError, SourceError
from spire_dist.maps import read_map, write_map
from spire_dist.results import agreement, evaluate, fsc, truth


@pytest.fixture(scope="module")
def scored(standin):
    exact = dataclasses.replace(standin, latents=_on_the_ring(standin))
    return evaluate.score(exact, standin.directory.parent / "truth", images=12)


def _on_the_ring(standin):
    turn = np.rint(np.arctan2(standin.latents[:, 1], standin.latents[:, 0]) * 6 / (2 * np.pi)) * 2 * np.pi / 6
    return np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1).astype(np.float32)


def test_perfect_model_reaches_the_ceiling_and_rigid_maps_do_not(scored):
    scores = scored[0]["scores"]
    for kind in ("per_conformation", "per_image"):
        for mask in ("masked", "unmasked"):
            assert scores[f"{kind}/model_{mask}"]["mean"] == pytest.approx(fsc.ceiling(32), abs=2e-4)
    assert scores["per_conformation/consensus_unmasked"]["mean"] < 0.9 * fsc.ceiling(32)


def test_consensus_that_is_the_average_scores_as_the_averaged_truth(scored):
    scores = scored[0]["scores"]
    assert scores["per_conformation/consensus_masked"]["mean"] == pytest.approx(
        scores["per_conformation/average_masked"]["mean"], abs=1e-5
    )


def test_scores_are_those_of_the_maps_at_the_image_nearest_to_each_mean(standin):
    folder = standin.directory.parent / "truth"
    result, _ = evaluate.score(standin, folder, images=0, masked=False)
    labels = truth.read_labels(folder, standin.store)
    expected = []
    for state in range(6):
        members = np.flatnonzero(labels == state)
        mean = standin.latents[members].mean(axis=0)
        z = min((standin.latents[m] for m in members), key=lambda z: np.linalg.norm(z - mean))
        true_map = read_map(folder / f"vols/32_org/{state:03d}.mrc")[0]
        expected.append(fsc.auc(fsc.benchmark_fsc(true_map, standin.volume(z))))
    assert result["scores"]["per_conformation/model_unmasked"]["each"] == pytest.approx(expected)
    assert not any(name.startswith("per_image") for name in result["scores"])


def test_per_image_score_takes_every_nth_row_of_the_input():
    shuffled = np.random.default_rng(0).permutation(3352 * 3 + 40)
    rows = evaluate.every_nth(shuffled, 3)
    np.testing.assert_array_equal(shuffled[rows], np.arange(0, len(shuffled), len(shuffled) // 3))
    assert len(evaluate.every_nth(np.arange(335240), 100)) == 101  # as the benchmark has it on Ribosembly


def test_labels_follow_the_source_row_of_each_particle(standin):
    labels = truth.read_labels(standin.directory.parent / "truth", standin.store)
    np.testing.assert_array_equal(labels, standin.store.source_index // 20)


@pytest.fixture
def of_two_files(standin):
    """The stand-in as if its particles came from two files: rows 0 to 59 of each."""
    index = standin.store.source_index
    two = SimpleNamespace(**vars(standin.store) | {
        "sources": [*standin.store.sources, standin.directory / "second.star"], "label": index // 20,
        "source": (index >= 60).astype(np.int32), "source_index": index % 60,
    })  # fmt: skip
    return dataclasses.replace(standin, store=two)


def test_images_of_equal_rows_of_two_files_are_scored_apart(of_two_files):
    folder = of_two_files.directory.parent / "truth"
    result, curves = evaluate.score(of_two_files, folder, images=12, masked=False)
    keys = [(1, row) for row in range(0, 60, 10)] + [(2, row) for row in range(0, 60, 10)]
    assert list(curves["per_image/model_unmasked"]) == keys
    assert result["scores"]["per_image/model_unmasked"]["count"] == 12
    assert [file for file, _ in result["representatives"]] == [1, 1, 1, 2, 2, 2]


def test_labels_by_row_are_refused_where_rows_are_of_several_files(of_two_files, refusal):
    of_two_files.store.label = None
    words = ["gt_latents.pkl", "which file", "of 2"]
    refusal(SourceError, words, lambda: evaluate.score(of_two_files, of_two_files.directory.parent / "truth"))


def test_files_are_written_and_repeat_the_numbers(standin, monkeypatch):
    monkeypatch.setattr(evaluate, "load_run", lambda run: standin)
    result = evaluate.evaluate(standin.directory, standin.directory.parent / "truth", conformations=3, images=4)
    assert json.loads((standin.directory / "evaluation.json").read_text()) == result
    assert result["conformations"] == [0, 2, 5]
    curve = np.loadtxt(standin.directory / "evaluation/per_conformation/model_masked/000002.txt", skiprows=1)
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(
        result["scores"]["per_conformation/model_masked"]["each"][1], abs=1e-6
    )
    assert (standin.directory / "evaluation.png").stat().st_size > 5000
    assert "at most 0.4688" in evaluate.table(result)
    assert not list(standin.directory.glob(".*partial*"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vols", "vols: nothing there; the true maps of this run are looked for in vols/32_org"),
        ("gt_latents.pkl", "gt_latents.pkl: no such file, and the store has no labels"),
    ],
)
def test_missing_truth_is_named_in_one_line(standin, tmp_path, missing, message):
    folder = shutil.copytree(standin.directory.parent / "truth", tmp_path / "truth")
    shutil.rmtree(folder / missing, ignore_errors=True)
    (folder / missing).unlink(missing_ok=True)
    with pytest.raises(SourceError, match=message) as caught:
        evaluate.score(standin, folder)
    assert "\n" not in str(caught.value)


def test_label_without_a_map_is_refused(standin, tmp_path):
    folder = shutil.copytree(standin.directory.parent / "truth", tmp_path / "truth")
    (folder / "vols/32_org/005.mrc").unlink()
    with pytest.raises(SourceError, match="labels 0 to 5, but 5 true maps"):
        evaluate.score(standin, folder)


def test_nonsense_counts_are_refused(standin):
    with pytest.raises(ConfigError, match="conformations 0"):
        evaluate.score(standin, standin.directory.parent / "truth", conformations=0)


def test_cropped_truth_keeps_place_and_height_of_a_smooth_blob():
    grid = np.indices((48, 48, 48)) - 24
    centre = np.array([6, -4, 2])[:, None, None, None]
    blob = np.exp(-((grid - centre) ** 2).sum(axis=0) / (2 * 4.0**2))
    cropped = truth.fourier_crop(blob, 24)
    small = (np.indices((24, 24, 24)) - 12) * 2
    np.testing.assert_allclose(cropped, np.exp(-((small - centre) ** 2).sum(axis=0) / (2 * 4.0**2)), atol=2e-3)


def test_variable_share_of_a_gaussian_equals_the_one_of_its_map():
    rng = np.random.default_rng(0)
    centres, weights, width = rng.normal(0, 3, (4, 1, 3)), rng.uniform(0.5, 1, (4, 1)), 3.0
    grid = np.stack(np.meshgrid(*[np.arange(-24, 25.0)] * 3, indexing="ij"), axis=-1)
    maps = np.stack(
        [w * np.exp(-((grid - c) ** 2).sum(-1) / (2 * width**2)) for c, w in zip(centres, weights, strict=True)]
    )
    expected = 1 - (maps.mean(axis=0) ** 2).sum() / (maps**2).sum(axis=(1, 2, 3)).mean()
    assert agreement.variable_share(centres, weights, np.array([width]))[0] == pytest.approx(expected, abs=1e-6)


def test_known_parts_agree_fully_and_a_split_arm_only_when_merged(standin):
    residues = truth.open_truth(standin.directory.parent / "truth", 32, 6.0).residues()
    ring = 2 * np.pi * np.arange(6) / 6
    decoded = standin.decode(np.stack([np.cos(ring), np.sin(ring), 0 * ring], axis=1))
    same = agreement.parts_agreement(*decoded, standin.widths, standin.parts, residues, np.arange(6))
    assert (same["unmerged"], same["merged"], same["merged_by_model"]) == (1, 1, 1)
    split = standin.parts.copy()
    split[-15:] = 2
    parts = agreement.parts_agreement(*decoded, standin.widths, split, residues, np.arange(6))
    assert parts["merged"] == parts["merged_by_model"] == 1
    assert parts["unmerged"] == pytest.approx(adjusted_rand_score(standin.parts, split))
    assert [part["moving_in_truth"] for part in parts["parts"]] == [0, 1, 1]


def test_random_parts_agree_no_better_than_chance(standin):
    residues = truth.open_truth(standin.directory.parent / "truth", 32, 6.0).residues()
    decoded = standin.decode(np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0]]))
    parts = np.random.default_rng(0).integers(0, 4, 90)
    found = agreement.parts_agreement(*decoded, standin.widths, parts, residues, np.array([0, 1, 3]))
    assert abs(found["unmerged"]) < 0.1


def test_absent_residues_do_not_vote(standin):
    residues = truth.Residues(
        np.array([[[0, 0, 0], [9, 9, 9]]], np.float32), np.array([[False, True]]), np.array([1, 0]), []
    )
    labels = agreement.truth_labels(np.zeros((1, 1, 3)), np.ones((1, 1)), residues, np.array([0]))
    assert labels.tolist() == [0]


def test_two_map_files_are_compared_with_their_resolution(standin):
    halves = [standin.consensus.with_name(f"consensus_half{n}.mrc") for n in (1, 2)]
    found = evaluate.compare_maps(*halves)
    assert found.curve[1] > 0.9
    assert 12 <= found.resolution_0143 <= found.resolution_05
    write_map(standin.directory / "small.mrc", np.ones((8, 8, 8), np.float32), 6.0)
    with pytest.raises(SourceError, match="both maps must have the same box and pixel size"):
        evaluate.compare_maps(halves[0], standin.directory / "small.mrc")
