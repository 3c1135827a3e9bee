"""A run whose number of parts is chosen by the data keeps what was measured, and goes on to the same bits."""

import json

import numpy as np
import pytest

from spire_dist.training import train as module
from tests.training.test_resume import Crash, assert_same_results

AUTO = ("parts.clusters=auto", "parts.most=3", "stage1.epochs=0.5", "stage2.epochs=0.3")


def test_the_number_is_chosen_kept_and_the_same_after_a_crash(train_tiny, tmp_path, monkeypatch, capsys):
    run = train_tiny(tmp_path / "run", *AUTO)
    study = json.loads((run / "stage1" / "parts.json").read_text())
    assert study["by"] == "data"
    assert [m["count"] for m in study["measures"]] == [1, 2, 3]
    assert study["chosen"] == len(study["stability"]) <= 3
    assert f"{study['chosen']} clusters of features (number by data, stability " in capsys.readouterr().out
    assert len(np.unique(np.load(run / "stage1" / "parts.npy"))) >= study["chosen"]

    def crashing(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(module, "seed_second", crashing)
        with pytest.raises(Crash):
            train_tiny(tmp_path / "again", *AUTO)
    train_tiny(tmp_path / "again", *AUTO)
    assert_same_results(tmp_path / "again", run)


def test_a_number_given_by_hand_is_kept_and_its_parts_are_judged(finished_table):
    study = json.loads((finished_table / "stage1" / "parts.json").read_text())
    assert study["by"] == "hand"
    assert study["chosen"] == len(study["stability"]) == 2
    assert all(0 < value <= 1 for value in study["stability"])
