import json

import torch

from spire_dist.training.metrics import RunLog


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_beyond_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    lines = [json.dumps({"stage": stage, "step": step}) for stage, step in [(1, 10), (1, 20), (2, 5), (2, 9)]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": 2, "st')
    RunLog(tmp_path, 1.0, torch.device("cpu"), (2, 5)).close()
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [(1, 10), (1, 20), (2, 5)]


def test_an_interval_is_the_mean_of_its_steps(tmp_path):
    log = RunLog(tmp_path, 1.0, torch.device("cpu"), (1, 0))
    log.count(64, 1.0)
    log.count(32, 2.0)
    log.write(1, 2, 10, 0.5, waited_s=0.0)
    log.close()
    (record,) = records(tmp_path)
    assert record["loss"] == 1.5
    assert record["step"] == 2
    assert record["images_per_s"] > 0
