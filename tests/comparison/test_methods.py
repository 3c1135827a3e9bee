"""Every method that a comparison knows has settings that load, and the right ones win."""

from pathlib import Path

import pytest

from spire_dist.comparison.methods import RIVALS, Own, Rival, choose_methods, read_methods, read_seeds
from spire_dist.config import load_config, read_preset
from spire_dist.errors import ConfigError

OWN = [name for name, method in read_methods().items() if isinstance(method, Own)]


@pytest.mark.parametrize("preset", ["demo", "cryobench"])
@pytest.mark.parametrize("name", OWN)
def test_settings_of_every_method_load_on_every_preset(name: str, preset: str, tmp_path: Path):
    method = read_methods()[name]
    assert isinstance(method, Own)
    config = method.config(tmp_path / "store", preset, ["stage1.epochs=3"], seed=7)
    assert (config.seed, config.stage1.epochs, config.data.store) == (7, 3, tmp_path / "store")
    plain = load_config(
        preset=preset, overrides=["stage1.epochs=3", "seed=7", f"data.store={str(tmp_path / 'store')!r}"]
    )
    assert (config == plain) == (name == "ours")


def test_the_papers_settings_are_those_of_the_preset_for_its_sets():
    method = read_methods()["paper"]
    assert isinstance(method, Own)
    config = load_config(preset="demo", overrides=method.starting).model_dump()
    for section, values in read_preset("cryobench").items():
        assert config[section] | values == config[section]


def test_what_makes_a_method_wins_over_the_users_setting_and_a_starting_value_does_not():
    fixed, starting = read_methods()["anchors-64"], read_methods()["paper"]
    assert isinstance(fixed, Own)
    assert isinstance(starting, Own)
    asked = ["parts.anchors=8"]
    assert fixed.config(Path("s"), "demo", asked, 0).parts.anchors == 64
    assert starting.config(Path("s"), "demo", asked, 0).parts.anchors == 8


def test_methods_are_chosen_by_name_or_all_that_can_run(refusal):
    assert [method.name for method in choose_methods(None, ())] == OWN
    everything = choose_methods(None, RIVALS)
    assert [method.name for method in everything if isinstance(method, Rival)] == [
        "cryodrgn-256x3",
        "cryodrgn-128x2",
        "recovar",
        "recovar-small",
    ]
    assert [method.name for method in choose_methods(["paper", "ours", "paper"], ())] == [
        "paper",
        "ours",
    ]
    refusal(ConfigError, ["outs", "ours,paper"], lambda: choose_methods(["outs"], RIVALS))
    refusal(ConfigError, ["cryodrgn-128x2", "--cryodrgn"], lambda: choose_methods(["cryodrgn-128x2"], ["recovar"]))


def test_seeds_are_whole_numbers_once_each(refusal):
    assert read_seeds("3,1,3") == [3, 1]
    for wrong in ("", "1,", "a", "-1", "0.5"):
        refusal(ConfigError, [f"--seeds {wrong}", "0,1,2"], lambda wrong=wrong: read_seeds(wrong))
