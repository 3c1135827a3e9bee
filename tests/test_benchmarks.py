"""The benchmarks run from one command and measure what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_igg_goes_the_whole_way_and_collects_every_number(tmp_path: Path, shared_data: Path):
    model = shared_data / "models" / "sarata00+SBI_Project" / "1hzh.pdb.gz"
    table = shared_data / "ctf" / "empiar10028_ctf.npy"
    settings = ["stage1.gaussians=64", "stage2.gaussians=64", "stage1.epochs=1", "stage2.epochs=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    files = ("--model", model, "--ctf-table", table)
    printed = run_benchmark("igg", tmp_path, *files, "--states", 2, "--particles", 128, *words)
    assert "64 px × 6.0 Å, SNR 0.1 after cropping" in printed
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["data"]["counts"] == [64, 64]
    assert result["ceiling"] == 31 / 64
    assert all(0 < value < 31 / 64 for means in result["auc"].values() for value in means.values())
    assert result["auc"]["average"]["unmasked"] > result["auc"]["stage 1"]["unmasked"]  # 64 Gaussians after one pass
    assert set(result["adjusted_rand_index"]) == {"stage 1", "stage 2"}
