"""Recipes: the benchmark's sets, small."""

import inspect
import itertools
import json
import re
import sys

import mrcfile
import numpy as np
import pytest
from typer.main import get_command

from spire_dist.cli import app, main
from spire_dist.errors import ConfigError
from spire_dist.simulation.molecules import read_molecule
from spire_dist.simulation.recipes import recipe
from spire_dist.simulation.simulate import simulate
from spire_dist.simulation.states import assembly_states

NAMES = ["igg-1d", "igg-rl", "tomotwin", "ribosembly"]
PUBLISHED = [
    9076, 14378, 23547, 44366, 30647, 38500, 3915, 3980, 12740, 11975, 17988, 5001, 35367, 37448, 40540, 5772,
]  # fmt: skip
QUICK = {"box": 32, "pixel_size": 12.0, "snr": 1.0}


@pytest.fixture(scope="module")
def igg(shared_data):
    return shared_data / "models/sarata00+SBI_Project/1hzh.pdb.gz"


@pytest.fixture(scope="module")
def blocks(shared_data):
    return sorted((shared_data / "models/lkinman+MAVEn/protocol_examples").glob("*.pdb.gz"))


@pytest.mark.parametrize("name", NAMES)
def test_all_recipes_make_the_benchmarks_images(name):
    settings = recipe(name, models=100)
    assert settings["particles"] == (335240 if name == "ribosembly" else 100000)
    assert (settings["box"], settings["pixel_size"], settings["ctf_box"], settings["snr_at"]) == (
        128,
        3.0,
        256,
        "before",
    )
    assert (settings["snr"], settings["shift_a"], settings["hidden_b_factor"], settings["sign"]) == (0.01, 30, 100, "+")
    assert settings["table_voltage_kv"] == settings["voltage_kv"] == 300
    assert recipe(name, scale=0.01, models=100)["particles"] == settings["particles"] // 100
    assert recipe(name, scale=0.01)["scale"] == 0.01


def test_images_of_a_mixture_follow_its_models():
    assert recipe("tomotwin", models=7)["particles"] == 7000


def test_ribosembly_has_the_published_counts(tmp_path):
    settings = recipe("ribosembly")
    assert settings["proportions"] == PUBLISHED
    assert len(settings["omit"]) == 16
    assert settings["omit"][15] == ""


def test_states_of_the_ribosome_differ_by_whole_groups_of_blocks(blocks):
    ribosome = read_molecule(blocks)
    states = assembly_states(ribosome, recipe("ribosembly")["omit"])
    electrons = states.present * ribosome.weights
    for a, b in itertools.combinations(electrons, 2):
        assert np.abs(a - b).sum() > 15_000  # H68, H69 and H71 have 19,898
    whole = electrons[15].sum()
    assert electrons[0].sum() < 0.2 * whole
    assert np.median(electrons.sum(axis=1)) > 0.6 * whole
    by_chain = [set(states.present[:, ribosome.chains == chain].mean(axis=1)) for chain in set(ribosome.chains)]
    assert all(shares <= {0.0, 1.0} for shares in by_chain)
    assert states.present.all(axis=0)[np.isin(ribosome.chains, [f"RNA1.{c}" for c in "BCDEFGHIJKLMNOPQRSTUVW"])].all()
    # Ten groups: the nine that come and go, and what is always there.
    assert len(set(states.group.tolist())) == 10


@pytest.mark.parametrize(
    ("name", "scale", "models", "words"),
    [
        ("igg", 1.0, 1, ["'igg'", *NAMES]),
        ("common", 1.0, 1, ["'common'", *NAMES]),
        ("igg-1d", 0.0, 1, ["scale", "0.0"]),
        ("igg-1d", 1.5, 1, ["scale", "1.5"]),
        ("igg-rl", 1.0, 0, ["igg-rl", "1HZH", "--model"]),
    ],
)
def test_recipe_that_cannot_be_made_is_refused(refusal, name, scale, models, words):
    refusal(ConfigError, words, lambda: recipe(name, scale, models))


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["spire-dist", "simulate", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code or 0


def test_options_win_over_the_recipe(tmp_path, monkeypatch, igg):
    words = ["--recipe", "igg-rl", "--scale", 0.0003, "--model", igg, "--box", 32, "--pixel-size", 12, "--states", 3]
    assert command(monkeypatch, tmp_path / "set", *words, "--hidden-b-factor", 0, "--linker", "H:240-242") == 2
    assert command(monkeypatch, tmp_path / "set", *words, "--hidden-b-factor", 0, "--sign", "-") == 0
    report = json.loads((tmp_path / "set/simulation.json").read_text())
    assert (report["recipe"], report["scale"], report["states"]) == ("igg-rl", 0.0003, 3)
    assert (report["hidden_b_factor"], report["sign"], report["box"]) == (0, "-", 32)
    assert (report["snr"], report["snr_box"], report["linker"], report["seed"]) == (0.01, 64, "H:232-238", 0)
    assert report["counts"] == [10, 10, 10]
    assert len(list((tmp_path / "set/images").iterdir())) == 3
    residues = np.load(tmp_path / "set/residues.npz")
    assert residues["group_names"].tolist() == ["fixed", "H:1-230,L", "H:232-238"]


def test_help_states_the_defaults_that_there_are():
    defaults = inspect.signature(simulate).parameters
    stated = 0
    for option in get_command(app).commands["simulate"].params:
        found = re.search(r"\[([^\]]+)\]\.?$", getattr(option, "help", None) or "")
        if found and option.name != "proportions":  # "equal"
            default = defaults[option.name].default
            words = [
                f"{x:g}" if isinstance(x, float) else str(x) for x in np.atleast_1d(np.array(default, dtype=object))
            ]
            assert found[1].split() == words, option.name
            stated += 1
    assert stated >= 14


def test_scale_without_a_recipe_is_refused(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path / "set", "--scale", 0.1) == 2
    assert "--recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_turning_recipe_makes_a_closed_circle(tmp_path, igg):
    out = simulate(tmp_path / "set", model=igg, **(recipe("igg-1d", 0.001) | QUICK | {"states": 6}))
    maps = np.stack([mrcfile.read(path) for path in sorted((out / "vols/32_org").iterdir())])
    steps = np.linalg.norm((maps - np.roll(maps, 1, axis=0)).reshape(6, -1), axis=1)
    assert steps.max() < 2 * steps.min()


def test_mixture_recipe_has_each_complex_in_the_middle_and_no_residues(tmp_path, shared_data, igg):
    spike = shared_data / "models/jbloomlab+SARS-CoV-2-RBD_DMS/data/structures/ACE2-bound/6vxx.pdb.gz"
    models = [igg, spike, shared_data / "models/BioJulia+BioFmtSpecimens/PDB/1AKE.pdb.gz"]
    out = simulate(tmp_path / "set", model=models, **(recipe("tomotwin", 0.01, models=3) | QUICK))
    report = json.loads((out / "simulation.json").read_text())
    assert report["counts"] == [10, 10, 10]
    assert report["group_names"] == ["fixed", "1hzh", "6vxx", "1AKE"]
    assert not (out / "residues.npz").exists()
    grid = (np.indices((32,) * 3) - 16).reshape(3, -1)
    for number, path in enumerate(models):
        volume = mrcfile.read(out / f"vols/32_org/{number:03d}.mrc").astype(float)
        np.testing.assert_allclose(grid @ volume.ravel() / volume.sum(), 0, atol=0.05)  # px
        assert volume.sum() * 12.0**3 == pytest.approx(read_molecule([path]).weights.sum(), rel=1e-4)
