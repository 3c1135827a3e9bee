"""The configuration: what is wrong is told in one line; what is right survives a file."""

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from spire_dist.config import RunConfig, dump_config, load_config, read_preset
from spire_dist.errors import ConfigError

PRESETS = ("demo", "cryobench", "empiar")


def sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, type[BaseModel]]:
    """Every section by its dotted name, the top one as ''."""
    found = {prefix: model}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= sections(field.annotation, f"{prefix}.{name}".lstrip("."))
    return found


@pytest.mark.parametrize("section", sections())
def test_an_unknown_key_is_named_with_the_valid_ones_of_its_section(section, refusal):
    key = f"{section}.colour".lstrip(".")
    message = refusal(ConfigError, [f"'{key}'"], lambda: load_config(overrides=[f"{key}=1"]))
    valid = message.split("valid here: ")[1].split(", ")
    assert valid == list(sections()[section].model_fields)


@pytest.mark.parametrize(
    "override",
    ["seed='x'", "stage1.epochs=0", "stage1.batch=1.5", "stage2.rates.centres_px=-1", "latent.kind='banana'",
     "latent=3", "stage1.epochs=inf", "stage1.epochs=nan", "latent.weight=nan", "data.store=5",
     "output.keep=[1,2]", "consensus.padding=9", "stage2.cut=''"],
)  # fmt: skip
def test_a_bad_value_is_one_line_with_its_key_and_itself(override, refusal):
    key, value = override.split("=", 1)
    refusal(ConfigError, [f"{key} = ", value.strip("'[]").split(",")[0]], lambda: load_config(overrides=[override]))


@pytest.mark.parametrize("text", ["stage1.epochs", "=5", ".=1", "stage1..epochs=1"])
def test_an_override_that_names_no_key_is_refused(text, refusal):
    refusal(ConfigError, [], lambda: load_config(overrides=[text]))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"stage1 = ", ["not valid TOML"]), (b"\xff\xfe\x00binary", []), (b"[stage1]\nepochs = 'x'\n", ["stage1.epochs"])],
)
def test_a_bad_file_is_named(tmp_path, refusal, content, words):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    refusal(ConfigError, [str(path), *words], lambda: load_config(path))


def test_a_missing_file_is_named(tmp_path, refusal):
    for path in (tmp_path / "no.toml", tmp_path):
        refusal(ConfigError, [str(path), "cannot be read"], lambda path=path: load_config(path))


def test_an_unknown_preset_is_refused_with_the_known_ones(refusal):
    refusal(ConfigError, ["'huge'", *PRESETS], lambda: load_config(preset="huge"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_changes_what_it_says(name):
    config = load_config(preset=name).model_dump()
    for section, values in read_preset(name).items():
        assert {key: config[section][key] for key in values} == values


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_dumped_configuration_reads_back_equal(tmp_path, preset):
    overrides = ["data.store='a \"b\"/ü.zarr'", "consensus.map='m.mrc'", "stage2.rates.widths=1e-7", "seed=3"]
    for settings in ([], overrides):
        config = load_config(preset=preset, overrides=settings)
        path = tmp_path / "config.toml"
        path.write_text(dump_config(config))
        assert load_config(path) == config


def test_precedence_is_defaults_preset_file_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[stage1]\nepochs = 7\nbatch = 9\n[stage1.rates]\nwidths = 0.5\n")
    overrides = ["stage1.batch=11", "stage1.batch=12", "latent.kind=encoder"]
    config, default = load_config(path, "demo", overrides), RunConfig()
    preset = read_preset("demo")["stage1"]
    assert preset["gaussians"] != default.stage1.gaussians
    assert config.stage1.gaussians == preset["gaussians"]
    assert config.stage1.epochs == 7 != preset["epochs"]
    assert config.stage1.batch == 12
    assert config.stage1.rates.widths == 0.5
    assert config.stage1.rates.centres_px == default.stage1.rates.centres_px
    assert config.latent.kind == "encoder"
    assert config.stage2.final_rate == default.stage2.final_rate


def test_every_field_is_described():
    for name, model in sections().items():
        for field, info in model.model_fields.items():
            section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
            text = info.annotation.__doc__ if section and not info.description else info.description
            assert text, f"{name}.{field}"
            assert len(text) > 10, f"{name}.{field}"


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().stage1.epochs = 3


def test_presets_file_holds_only_tested_presets():
    presets = Path(load_config.__code__.co_filename).with_name("presets.toml")
    assert tuple(tomllib.loads(presets.read_text())) == PRESETS


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "true", "'many'"])
def test_a_number_of_parts_that_is_none_is_refused_in_one_line(value, refusal):
    text = ["parts.clusters = ", "whole number of at least 1, or auto"]
    refusal(ConfigError, text, lambda: load_config(overrides=[f"parts.clusters={value}"]))
    assert load_config(overrides=["parts.clusters=auto"]).parts.clusters == "auto"
