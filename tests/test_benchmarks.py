"""The benchmarks run from one command and measure what they say."""

import itertools
import json
import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from benchmarks import leaderboard, peer
from benchmarks.growth import exponent
from benchmarks.memory import peak_rise
from benchmarks.precision import inside_spread
from benchmarks.ranks import Case, measure
from benchmarks.scaling import Costs, step_seconds
from benchmarks.step import times
from benchmarks.tables import table
from spire_dist import cli
from spire_dist.comparison.methods import RIVALS, Own, choose_methods

ROOT = Path(__file__).parents[1]


def run_benchmark(name: str, *arguments: object) -> str:
    """What `python -m benchmarks.NAME ...` prints; fails with its standard error."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_projector_agrees_with_an_independent_dense_sum_in_float64(tmp_path: Path):
    printed = run_benchmark("projector", tmp_path, "--quick", "--threads", 1)
    result = json.loads((tmp_path / "projector.json").read_text())
    assert (tmp_path / "projector.png").stat().st_size > 1000
    assert result["machine"]["versions"]["torch"] in printed
    # A square window of ± c σ loses √(2 erfc(c)) of the image: 1.8e-4 at 4 σ, 1.8e-6 at 5 σ.
    # The widths' gradient weighs the tail by its distance squared: 10 times more.
    budgets = {"local 4σ": (1.8e-4, 2e-3), "local 5σ": (1.8e-6, 2e-5), "dense einsum": (2e-6, 2e-5)}
    for case in result["cases"]:
        assert case["methods"]["local 4σ"]["times_slower"] == 1
        for name, (image, gradients) in budgets.items():
            errors = case["errors"][name]
            assert errors.pop("image") < image
            assert max(errors.values()) < gradients


def test_a_mean_inside_the_spread_of_other_seeds_is_told_from_one_outside():
    assert inside_spread([0.40, 0.46], [0.42, 0.44])
    assert not inside_spread([0.40, 0.42], [0.42, 0.44])
    assert not inside_spread([0.44, 0.46], [0.42, 0.44])


@pytest.mark.slow
def test_precision_measures_every_store_and_trains_two(tmp_path: Path, shared_data: Path):
    model = shared_data / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
    files = ("--model", model, "--ctf-table", shared_data / "ctf" / "empiar10028_ctf.npy")
    small = ["stage1.gaussians=64", "stage2.gaussians=64", "stage1.epochs=1", "stage2.epochs=1", "output.volumes=2"]
    words = [word for setting in small for word in ("--set", setting)]
    printed = run_benchmark("precision", tmp_path, *files, "--states", 2, "--particles", 128, "--seeds", "3", *words)
    assert "Compact's mean" in printed
    result = json.loads((tmp_path / "precision.json").read_text())
    rows = {row["precision"]: row for row in result["precisions"]}
    assert rows["float32"]["error_over_noise"] == 0
    # An image rounded to steps of s has an error of s / √12 (here s is 1/16 of its deviation, close to that of its noise);
    # float16 has 11 bits, so that the error of a value between 1 and 2 is 2^-10 / √12, and less below.
    assert rows["compact"]["error_over_noise"] == pytest.approx(1 / 16 / 12**0.5, rel=0.15)
    assert rows["float16"]["error_over_noise"] < 2**-10 / 12**0.5
    errors = [rows[f"float16, {bits} bits, zstd"]["error_over_noise"] for bits in (6, 5, 4)]
    assert [b / a for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], rel=0.05)
    assert set(result["auc"]) == {"float16", "compact"}
    assert (tmp_path / "precision.png").stat().st_size > 1000


@pytest.mark.slow
def test_igg_goes_the_whole_way_and_collects_every_number(tmp_path: Path, shared_data: Path):
    model = shared_data / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
    rows = shared_data / "ctf" / "empiar10028_ctf.npy"
    settings = ["stage1.gaussians=64", "stage2.gaussians=64", "stage1.epochs=1", "stage2.epochs=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    files = ("--model", model, "--ctf-table", rows)
    printed = run_benchmark("igg", tmp_path, *files, "--states", 2, "--particles", 128, *words)
    assert "64 px × 6.0 Å, SNR 0.1 after cropping" in printed
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["data"]["counts"] == [64, 64]
    assert result["ceiling"] == 31 / 64
    assert all(0 < value < 31 / 64 for means in result["auc"].values() for value in means.values())
    assert result["auc"]["average"]["unmasked"] > result["auc"]["stage 1"]["unmasked"]  # 64 Gaussians after one pass
    assert set(result["adjusted_rand_index"]) == {"stage 1", "stage 2"}


@pytest.mark.slow
def test_poses_are_put_off_refined_and_trained_on_again(tmp_path: Path, shared_data: Path):
    model = shared_data / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
    rows = shared_data / "ctf" / "empiar10028_ctf.npy"
    small = ["stage1.gaussians=64", "stage2.gaussians=64", "stage1.epochs=1", "stage2.epochs=1", "output.volumes=2"]
    words = [word for setting in small for word in ("--set", setting)]
    files = ("--model", model, "--ctf-table", rows)
    printed = run_benchmark("poses", tmp_path, *files, "--states", 2, "--particles", 128, *words)
    assert (tmp_path / "poses.md").read_text() in printed
    result = json.loads((tmp_path / "poses.json").read_text())
    assert set(result["runs"]) == {"run", "run-perturbed", "run-refined", "run-again"}
    before, after = (result["errors"][name] for name in ("run-perturbed", "run-refined"))
    assert before["turn_deg_rms"] == pytest.approx(2, abs=0.3)  # of 384 normal numbers: ± 0.07
    assert before["shift_rms"] == pytest.approx(1, abs=0.2)  # of 256: ± 0.04
    assert after["shift_rms"] != before["shift_rms"]


@pytest.mark.slow
def test_step_without_its_peer_times_every_case_and_says_so(tmp_path: Path, shared_data: Path):
    model = shared_data / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
    rows = shared_data / "ctf" / "empiar10028_ctf.npy"
    printed = run_benchmark("step", tmp_path, "--quick", "--threads", 1, "--model", model, "--ctf-table", rows)
    assert "cryoDRGN was not measured" in printed
    assert (tmp_path / "step.md").read_text() in printed
    assert (tmp_path / "step.png").stat().st_size > 1000
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["times_peer"] is None
    assert [len(rates) for rates in result["images_per_s"].values()] == [1, 1, 1]
    # A step holds at least centres and amplitudes and their gradients, 8 floats, for every Gaussian of every image.
    assert all(size["bytes"] > 32 * size["images"] * size["gaussians"] for size in result["memory"]["sizes"])
    assert len(result["growth"]["images"]["ns_per_pair"]) == len(result["growth"]["gaussians"]["ns_per_pair"]) == 4


def test_python_without_cryodrgn_is_told_how_to_get_it():
    with pytest.raises(typer.BadParameter, match=r"pip install cryodrgn==4\.3\.1"):
        peer.versions(Path(sys.executable))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["gpu", "gpu_steps"])
def test_gpu_benchmark_says_that_there_is_no_gpu_and_writes_nothing(tmp_path: Path, name: str):
    command = [sys.executable, "-m", f"benchmarks.{name}", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (2, "no CUDA device: nothing measured\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_gpu_steps_try_on_a_cpu_times_every_way_and_profiles_the_first(tmp_path: Path):
    printed = run_benchmark("gpu_steps", tmp_path, "--device", "cpu", "--quick")
    assert (tmp_path / "gpu_steps.md").read_text() in printed
    result = json.loads((tmp_path / "gpu_steps.json").read_text())
    ways = ["4 images, numba", "4 images, torch", "4 images, numba, fed from memory of the node", "8 images, numba"]
    for stage, target in zip(result["stages"], (20_000, 8_000), strict=True):
        assert [case["name"] for case in stage["cases"]] == ways
        speed = stage["cases"][0]["images_per_s"][0]
        assert re.search(rf"\| 4 images, numba +\| +{speed / target:.2f} \|", printed)
        calls = {row["name"]: row["calls"] for row in stage["kernels"]}
        assert calls["_Splat"] == calls["_SplatBackward"] == calls["_Residuals"] == 1  # of each step
        assert calls["_Pairs"] == 2  # shift and occupancy
        assert sum(row["share"] for row in stage["kernels"]) == pytest.approx(1)


@pytest.mark.slow
def test_loading_times_every_way_and_weighs_all_processes(tmp_path: Path):
    printed = run_benchmark("loading", tmp_path, "--particles", 20000, "--rounds", 1, "--sample", 100)
    assert (tmp_path / "loading.md").read_text() in printed
    result = json.loads((tmp_path / "loading.json").read_text())
    epochs = [f"shuffled epoch, {w}, {c}" for c in ("warm", "cold") for w in ("a thread", "1 process", "2 processes")]
    assert list(result["images_per_s"])[1:-1] == epochs
    assert result["sample"] == 100
    assert list(result["epochs"]) == ["2000", "20000"]
    for measured in result["epochs"].values():
        alone, *_, two = [epoch["peak_bytes"] for epoch in measured]
        assert 5e7 < alone < two  # the interpreter and torch at least, and of two more processes


def test_peak_rise_is_the_memory_held_at_once():
    def work() -> None:
        for size in (32_000_000, 8_000_000):
            with mmap.mmap(-1, size) as pages:  # new ones, unlike those of an array, which may be left from another
                for start in range(0, size, mmap.PAGESIZE):
                    pages[start] = 1

    assert peak_rise(work) == pytest.approx(32e6, rel=0.1)


def test_exponent_of_a_power_law_is_found():
    assert exponent((1, 2, 4), np.array([3.0, 3 * 2**1.5, 3 * 4**1.5])) == pytest.approx(1.5)


def test_ratio_is_the_median_over_rounds_and_not_the_ratio_of_medians():
    rates = {"peer": [10.0, 20.0, 40.0], "ours": [100.0, 600.0, 400.0]}
    assert times(rates, "peer") == {"peer": 1.0, "ours": 10.0}


def test_table_is_aligned_markdown():
    assert list(table(("", "images/s"), [("stage 1", "9")])) == [
        "|         | images/s |",
        "|---------|---------:|",
        "| stage 1 |        9 |",
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(("replicate", "gauss"), [(2, 1), (1, 2), (2, 2)])
def test_bytes_on_the_wire_are_those_of_the_formula(replicate, gauss):
    found = measure(Case(replicate, gauss, 4096, 64, 64, 10))
    assert found["bytes"] == pytest.approx(found["formula"], rel=0.05)
    alone = 4 * 4 * 4096 * (24 + 5)  # float32: parameters, gradients, Adam's two means
    assert found["gaussian_bytes"] == pytest.approx(alone / gauss, rel=0.1)


def test_ranks_that_send_for_nothing_take_their_part_of_a_step_and_others_what_they_send():
    free = Costs(2.5, 0.05, 0, 0, 1e30, 1e30, 0, 0, 8)
    alone, many = Case(1, 1, 4096, 64, 64, 1), Case(8, 2, 4096, 64, 64, 1)
    assert step_seconds(many, free) == pytest.approx(step_seconds(alone, free) / 16)
    wire = Costs(0, 0, 0, 0, 1e30, 1.0, 0, 0, 1)  # 1 GB/s, and every rank on a node of its own
    whole = 2 * 3 / 4 * 4 * 4096 * (24 + 5) + 2 * 3 / 4 * 4 * 1000
    assert step_seconds(Case(4, 1, 4096, 64, 64, 1), wire, common=1000) == pytest.approx(1e-9 * whole)


@pytest.mark.parametrize("name", sorted(path.stem for path in leaderboard.EXPERIMENTS.glob("*.toml")))
def test_an_experiment_makes_its_set_and_then_compares_methods_that_exist(name: str, tmp_path: Path):
    verbs = typer.main.get_command(cli.app)
    experiment = leaderboard.read_experiment(name)
    found = list(
        leaderboard.commands(
            experiment, tmp_path, Path("models"), Path("ctf.npy"), dict.fromkeys(RIVALS, Path("python")), 1
        )
    )
    assert [words[0] for words in found] == ["simulate"] + ["benchmark"] * len(experiment["benchmark"])
    for words in found:
        given = verbs.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=True).params  # pyright: ignore
        if words[0] == "simulate":
            assert name.startswith(given["recipe"])
            assert len(given["model"]) == len(experiment["models"]["names"])
        else:
            assert given["seeds"]
            for method in choose_methods(given["methods"].split(","), RIVALS):
                if isinstance(method, Own):
                    method.config(tmp_path, "demo", given["settings"], seed=0)
    without = list(leaderboard.commands(experiment, tmp_path, Path("models"), Path("ctf.npy"), {}, 1))
    assert not any(program in word for words in without for word in words for program in RIVALS)


def test_what_is_published_of_an_experiment_tells_no_places(tmp_path: Path):
    methods, docs = tmp_path / "methods", tmp_path / "docs"
    for folder in (methods, docs / "images"):
        folder.mkdir(parents=True)
    simulation = dict.fromkeys(leaderboard.SIMULATION, 1) | {"model": ["somewhere/1hzh.pdb"]}
    scores = {"scores": {"per_conformation/model_masked": {"mean": 0.4}}}
    run = {"method": "ours", "seed": 3, "machine": {"cores": 2}, "training_s": 20.0, "result": scores}
    run["earlier"] = [{"training_s": 10.04, "result": {"scores": {"per_conformation/model_masked": {"mean": 0.3}}}}]
    result = {
        "data": {"folder": "somewhere/set", "simulation": simulation},
        "rows": [{"name": "ours"}],
        "runs": [run],
    }
    (methods / "benchmark.json").write_text(json.dumps(result))
    (methods / "benchmark.png").write_bytes(b"picture")
    leaderboard.publish_result("igg-1d", methods, docs)
    text = (docs / "results" / "igg-1d.json").read_text()
    assert "somewhere" not in text
    assert json.loads(text)["curves"] == [{"method": "ours", "seed": 3, "points": [[10.0, 0.3], [20.0, 0.4]]}]
    assert (docs / "images" / "leaderboard-igg-1d.png").read_bytes() == b"picture"
