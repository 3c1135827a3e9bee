"""The tables of made-up results: every number where it belongs, published ones and those of runs never in one column."""

import json
from pathlib import Path

import pytest

from spire_dist.comparison.leaderboard import STAGE_1, read_published, write_leaderboard
from spire_dist.comparison.methods import read_methods
from spire_dist.results import fsc

MACHINE = {"processor": "abacus", "threads": 1, "cores": 2, "gpu": None, "versions": {"torch": "2"}}
OWN_SETTINGS = {
    "stage1": {"gaussians": 11, "epochs": 12.0}, "stage2": {"gaussians": 13, "epochs": 14.0},
    "parts": {"anchors": 15}, "latent": {"dimension": 16, "kind": "table"},
}  # fmt: skip
RIVAL_SETTINGS = {"program": "cryoDRGN 4.3.1 (torch 2)", "epochs": 7, "options": ["--zdim", "4"]}


def result(auc: float, *, masked: bool = True, rand: float | None = None) -> dict:
    """A result of `score_maps`, unmasked AUCs 0.1 lower, per-image ones 0.01 lower."""
    scores = {}
    for name in ("model", "consensus", "average"):
        for mask, lower in (("masked", 0.0), ("unmasked", 0.1)):
            if masked or mask == "unmasked":
                value = (auc if name == "model" else 0.222 if name == "consensus" else 0.233) - lower
                scores[f"per_conformation/{name}_{mask}"] = {"mean": value, "std": 0.0123, "median": value + 0.001}
                if name == "model":
                    scores[f"per_image/model_{mask}"] = {"mean": value - 0.01, "std": 0.02, "median": value}
    found = {
        "box": 64, "pixel_size_a": 6.0, "ceiling": fsc.ceiling(64), "conformations": [0, 1, 2], "scores": scores,
        "mask": {"file": "init_mask/mask.mrc", "share_of_box": 0.05} if masked else None,
    }  # fmt: skip
    return found if rand is None else found | {"classes": {"states": 3, "adjusted_rand_index": rand}}


def run(method: str, seed: int, auc: float, seconds: float, *, masked: bool = True) -> dict:
    early = {
        "at": STAGE_1 if "cryodrgn" not in method else "epoch 1",
        "training_s": seconds / 2,
        "result": result(auc - 0.05, masked=masked, rand=0.1),
    }
    settings = RIVAL_SETTINGS if "cryodrgn" in method else OWN_SETTINGS
    parts = {"parts": {"merged": auc + 0.3, "unmerged": 0.25}} if method == "ours" else {}
    return {
        "method": method, "seed": seed, "machine": MACHINE, "images": 1234, "settings": settings, "training_s": seconds,
        "result": result(auc, masked=masked, rand=0.9) | parts, "earlier": [early],
    }  # fmt: skip


def tables(text: str) -> list[dict[str, list[str]]]:
    """Every Markdown table as column -> cells, its first row being the header; no name stands for two columns."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    made = []
    for header, _, *rows in filter(None, found):
        assert len(set(header)) == len(header)
        made.append({name: [row[i] for row in rows] for i, name in enumerate(header)})
    return made


RUNS = [
    run("ours", 0, 0.46, 60.0), run("ours", 1, 0.47, 80.0), run("no-hierarchy", 0, 0.44, 50.0),
    run("cryodrgn-128x2", 0, 0.40, 600.0),
]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_leaderboard(tmp_path, tmp_path / "set", RUNS)


def test_published_numbers_and_those_of_runs_are_never_in_one_column(page: str):
    here, published = tables(page)
    assert not set(here) & set(published)
    names = read_published()["scores"]
    assert published["published"] == list(names)
    assert set(here["run here"]).isdisjoint(names)
    numbers = {f"{row[column][0]:.3f}" for row in names.values() for column in range(3) if row[column]}
    for cells in list(here.values())[1:]:
        assert not [cell for cell in cells if cell.split(" ")[0] in numbers]
    assert published["IgG-1D, 128 px"][6] == "0.402 (0.002) 0.402"
    assert published["Ribosembly, 128 px"][3] == "-"


def test_every_number_stands_in_its_row_and_column(page: str):
    here, _ = tables(page)
    row = {label: {name: cells[i] for name, cells in here.items()} for i, label in enumerate(here["run here"])}
    assert list(row) == [
        "ours", "- its stage 1 alone", "- without hierarchy", "cryoDRGN 128 × 2", "consensus, one rigid map",
        "average of the true maps", "largest possible",
    ]  # fmt: skip
    ours = row["ours"]
    assert ours["seeds"] == "2"
    assert ours["masked: AUC"] == "0.4650 (0.4600-0.4700)"
    assert (ours["masked: std"], ours["masked: median"]) == ("0.0123", "0.4660")
    assert ours["unmasked: AUC"] == "0.3650 (0.3600-0.3700)"
    assert ours["per image, masked"] == "0.4550 (0.4500-0.4600)"
    assert ours["training, s"] == "70 (60-80)"
    assert (ours["parts: moving"], ours["parts: each"]) == ("0.765 (0.760-0.770)", "0.250 (0.250-0.250)")
    assert row["- without hierarchy"]["parts: each"] == "-"
    assert row["- its stage 1 alone"]["training, s"] == "35 (30-40)"
    assert row["- its stage 1 alone"]["Rand index"] == "0.100 (0.100-0.100)"
    assert row["cryoDRGN 128 × 2"]["masked: AUC"] == "0.4000"
    assert row["consensus, one rigid map"]["masked: AUC"] == "0.2220"
    assert row["average of the true maps"]["unmasked: AUC"] == "0.1330"
    assert row["average of the true maps"]["training, s"] == "-"
    assert row["largest possible"]["masked: AUC"] == "0.4844"


def test_page_says_what_was_run_on_what_and_its_json_has_all_of_it(page: str, tmp_path: Path):
    for words in (
        "1234 images of 64 px at 6 Å/px, 3 conformations; a deposited set", "abacus, 1 of 2 cores; torch 2",
        "Mask: init_mask/mask.mrc, 5.0 % of the box.", "11 and 13 Gaussians, 12 and 14 epochs, 15 anchors",
        "cryoDRGN 4.3.1 (torch 2), 7 epoch(s), `--zdim 4`",
    ):  # fmt: skip
        assert words in page
    assert (tmp_path / "benchmark.md").read_text() == page
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["runs"] == RUNS
    assert written["rows"][0]["masked"] == [0.46, 0.47]
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_set_without_a_mask_and_rivals_alone_have_their_table(tmp_path: Path):
    page = write_leaderboard(tmp_path, tmp_path / "set", [run("cryodrgn-256x3", 0, 0.4, 9.0, masked=False)])
    here, _ = tables(page)
    assert here["run here"] == ["cryoDRGN 256 × 3", "average of the true maps", "largest possible"]
    assert here["masked: AUC"][:2] == ["-", "-"]
    assert "The set has no mask." in page


def test_published_numbers_are_whole_and_possible():
    published = read_published()
    for scores in published["scores"].values():
        assert len(scores) == len(published["sets"])
        for numbers in filter(None, scores):
            assert all(0 < number < fsc.ceiling(published["box"]) for number in numbers)
    # the paper's margin over the method next to it on IgG-1D
    assert published["scores"]["CryoSPIRE"][0][0] - published["scores"]["RECOVAR"][0][0] == pytest.approx(0.011)


def test_labels_are_told_apart():
    labels = [method.label for method in read_methods().values()]
    assert len(set(labels)) == len(labels)
