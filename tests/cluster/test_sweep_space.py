"""The file of a sweep: what is drawn from it, and what is refused before anything starts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sweep_space import PERTURBATION, Space, SweepConfig, Varied, load_space
from spire_dist.errors import ConfigError

GOOD = '[space]\n"stage1.rates.latents" = {log = [0.03, 1.0]}\n'


def load(folder: Path, text: str) -> Space:
    path = folder / "space.toml"
    path.write_text(text)
    return load_space(path)


ends = st.tuples(st.floats(1e-6, 1e6), st.floats(1.01, 1e6)).map(lambda pair: (pair[0], pair[0] * pair[1]))
varied = st.one_of(
    ends.map(lambda pair: Varied("f", "log", pair)),
    ends.map(lambda pair: Varied("f", "range", pair)),
    st.tuples(st.integers(-1000, 1000), st.integers(1, 1000)).map(lambda p: Varied("f", "int", (p[0], p[0] + p[1]))),
    st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=5, unique=True).map(
        lambda choices: Varied("f", "choice", tuple(choices))
    ),
)


def inside(one: Varied, value: Any) -> bool:
    if one.kind == "choice":
        return value in one.values
    return one.values[0] <= value <= one.values[1] and (one.kind != "int" or isinstance(value, int))


@settings(max_examples=200, deadline=None)
@given(one=varied, seed=st.integers(0, 2**32))
def test_what_is_drawn_and_what_it_is_changed_to_lies_in_the_space(one: Varied, seed: int):
    rng = np.random.default_rng(seed)
    value = one.draw(rng)
    assert inside(one, value)
    for _ in range(5):
        value = one.perturb(value, rng)
        assert inside(one, value)


def test_a_logarithm_is_drawn_evenly_and_changed_by_a_quarter():
    one, rng = Varied("f", "log", (0.01, 100.0)), np.random.default_rng(0)
    places = [math.log(one.draw(rng) / 0.01) / math.log(1e4) for _ in range(4000)]
    counts, _ = np.histogram(places, bins=4, range=(0, 1))
    assert counts.min() > 900
    changed = [one.perturb(1.0, rng) for _ in range(200)]
    steps = {round(value, 6) for value in changed} & {PERTURBATION, round(1 / PERTURBATION, 6)}
    assert len(steps) == 2
    assert 20 < sum(round(value, 6) not in steps for value in changed) < 90  # drawn anew


def test_more_trials_begin_with_the_same_ones_and_the_seed_decides(tmp_path):
    few, many = (load(tmp_path, f"[sweep]\ntrials = {n}\n{GOOD}").draws() for n in (4, 9))
    assert many[:4] == few
    assert load(tmp_path, f"[sweep]\ntrials = 4\nseed = 1\n{GOOD}").draws() != few


def test_a_space_survives_json(tmp_path):
    space = load(tmp_path, f'preset = "demo"\n[sweep]\nsearch = "pbt"\n{GOOD}latent.weight = {{choice = [0.1, 0.2]}}\n')
    again = Space.from_dict(json.loads(json.dumps(space.as_dict())))
    assert again == space
    assert again.draws() == space.draws()
    assert again.base.stage1.gaussians == 768


def test_base_is_a_table_a_file_or_nothing(tmp_path):
    (tmp_path / "base.toml").write_text("[stage1]\nepochs = 3\n")
    assert load(tmp_path, f'base = "base.toml"\n{GOOD}').base.stage1.epochs == 3
    assert load(tmp_path, f"[base.stage1]\nepochs = 4\n{GOOD}").base.stage1.epochs == 4
    table_over_preset = load(tmp_path, f'preset = "demo"\n[base.stage1]\nepochs = 4\n{GOOD}').base.stage1
    assert (table_over_preset.epochs, table_over_preset.gaussians) == (4, 768)
    assert load(tmp_path, GOOD).base.data.store.is_absolute()


@given(grace=st.floats(0.01, 0.99), reduction=st.floats(1.5, 10), interval=st.floats(0.01, 0.99))
def test_reports_come_at_growing_shares_and_the_last_at_the_end(grace: float, reduction: float, interval: float):
    for search in ("asha", "pbt", "random"):
        values = {"grace": grace, "reduction": reduction, "interval": interval, "search": search}
        shares = SweepConfig.model_validate(values).shares()
        assert shares == sorted(set(shares))
        assert shares[-1] == 1.0
        assert shares[0] > 0


def space_line(line: str) -> str:
    return f"[space]\n{line}\n"


PBT = '[sweep]\nsearch = "pbt"\n'
REFUSED = [
    ("", ["nothing varies"]),
    ("[sweeps]\n", ["unknown key 'sweeps'", "sweep"]),
    (f"[sweep]\ntrial = 3\n{GOOD}", ["unknown key 'sweep.trial'", "trials"]),
    (f"[sweep]\ntrials = 1\n{GOOD}", ["sweep.trials = 1", "greater than or equal to 2"]),
    (f'[sweep]\nsearch = "grid"\n{GOOD}', ["sweep.search = 'grid'", "'asha'"]),
    (f'[sweep]\nmetric = "auc"\n{GOOD}', ["sweep.truth"]),
    (f'[sweep]\nmetric = "auc"\ntruth = "nowhere"\n{GOOD}', ["nowhere", "no such folder"]),
    (f"[base.stage1]\nepoch = 3\n{GOOD}", ["base", "unknown key 'stage1.epoch'", "epochs"]),
    (f"base = 3\n{GOOD}", ["base = 3"]),
    (space_line("stage1.epoch = {log = [1, 2]}"), ["unknown key 'stage1.epoch'", "epochs"]),
    (space_line("stage3.epochs = {log = [1, 2]}"), ["unknown key 'stage3.epochs'", "stage1"]),
    (space_line("stage1 = {log = [1, 2]}"), ["stage1", "is a section", "epochs"]),
    (space_line("stage1.epochs.x = {log = [1, 2]}"), ["stage1.epochs.x", "is a field itself"]),
    (space_line("stage1.epochs = 3"), ["stage1.epochs = 3", "{log = "]),
    (space_line("stage1.epochs = {log = [1, 2], int = [1, 2]}"), ["stage1.epochs", "{log = "]),
    (space_line("stage1.epochs = {log = [0, 2]}"), ["log = [0, 2]", "above 0"]),
    (space_line("stage1.epochs = {range = [2, 1]}"), ["range = [2, 1]", "the smaller one first"]),
    (space_line("stage1.epochs = {range = [1, nan]}"), ["two numbers"]),
    (space_line("stage1.epochs = {range = [1, 2, 3]}"), ["two numbers"]),
    (space_line("stage1.hidden = {int = [1.5, 3]}"), ["two whole numbers"]),
    (space_line("stage1.epochs = {choice = []}"), ["choice = []"]),
    (space_line("stage1.epochs = {range = [-3, 3]}"), ["stage1.epochs = -3", "greater than 0"]),
    (space_line("stage1.hidden = {log = [8, 64]}"), ["stage1.hidden", "takes no fractions", "int or choice"]),
    (space_line('latent.kind = {range = [1, 2]}'), ["latent.kind", "takes no fractions"]),
    (space_line('latent.kind = {int = [1, 2]}'), ["latent.kind = 1"]),
    (space_line('latent.kind = {choice = ["table", "tabel"]}'), ["latent.kind = 'tabel'", "'encoder'"]),
    (space_line("data.workers = {int = [0, 2]}"), ["data.workers", "no part in the result"]),
    (space_line("threads = {int = [0, 2]}"), ["threads", "no part in the result"]),
    (f"{PBT}{space_line('stage1.hidden = {int = [8, 64]}')}", ["stage1.hidden", "cannot change while", "asha"]),
    (f"{PBT}{space_line('stage1.epochs = {range = [8, 64]}')}", ["stage1.epochs", "latent.weight"]),
    ("[space\n", ["not valid TOML"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[" ".join(words)[:40] for _, words in REFUSED])
def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, refusal, text, words):
    refusal(ConfigError, ["space.toml", *words], lambda: load(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path, refusal):
    refusal(ConfigError, ["none.toml", "cannot be read"], lambda: load_space(tmp_path / "none.toml"))
