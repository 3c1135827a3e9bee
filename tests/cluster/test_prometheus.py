"""Prometheus metrics: read back by Prometheus' own parser; the dashboard asks for nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.alarms import Alarm
from cluster.prometheus import metrics_text, write_metrics
from cluster.run_states import RankState, RunState
from spire_dist.errors import RunError

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD, PAGE = DOCS / "grafana.json", DOCS / "monitoring.md"

LABELS = ("run", "rank", "host", "state", "kind")

Samples = dict[tuple[str, ...], float]

RANKS = tuple(
    RankState(rank, f"n{rank}", 100 + rank, 412, rank == 0, 3.5 + rank, 90.5, 0.25, 0.5, 1.5) for rank in range(2)
)
TRAINS = RunState(
    path=Path("runs/igg"), name="igg", state="training", stage=1, step=412, total=4000, epoch=4.12, loss=0.998,
    images_per_s=181, eta_s=3600.5, eta_rough=True, elapsed_s=77.0, restarts=3, ranks=RANKS, slowest_rank=1, beat_age_s=3.5,
    job="4711", queue=None, message="", alarms=(),
)  # fmt: skip
UNKNOWN = RunState(
    path=Path("runs/new"), name='a "quoted"\\\nname', state="queued", stage=None, step=None, total=None, epoch=None, loss=None,
    images_per_s=None, eta_s=None, eta_rough=False, elapsed_s=None, restarts=0, ranks=(), slowest_rank=None, beat_age_s=None,
    job=None, queue=None, message="", alarms=(),
)  # fmt: skip


def parsed(text: str) -> dict[str, Samples]:
    """Metric -> values of its labels, in the order of `LABELS` -> value."""
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            key = tuple(sample.labels[name] for name in LABELS if name in sample.labels)
            assert key not in values
            values[key] = sample.value
    return found


def test_a_runs_metrics_are_its_state():
    found = parsed(metrics_text([TRAINS]))
    expected = {
        "spire_stage": 1, "spire_step": 412, "spire_stage_steps": 4000, "spire_epoch": 4.12, "spire_loss": 0.998,
        "spire_images_per_second": 181, "spire_left_seconds": 3600.5, "spire_trained_seconds": 77, "spire_restarts": 3,
        "spire_ranks": 2, "spire_beat_age_seconds": 3.5,
    }  # fmt: skip
    assert {name: samples[("igg",)] for name, samples in found.items() if ("igg",) in samples} == expected
    of_rank_1 = {name: samples[("igg", "1")] for name, samples in found.items() if ("igg", "1") in samples}
    assert of_rank_1 == {
        "spire_rank_step": 412, "spire_rank_waiting": 0, "spire_rank_beat_age_seconds": 4.5, "spire_rank_stuck": 0,
        "spire_rank_images_per_second": 90.5, "spire_rank_data_wait_ratio": 0.25, "spire_rank_collective_ratio": 0.5,
        "spire_rank_memory_bytes": 1.5 * 2**30,
    }  # fmt: skip
    assert found["spire_rank_info"] == {("igg", "0", "n0"): 1, ("igg", "1", "n1"): 1}
    assert [state for (_, state), value in found["spire_state"].items() if value == 1] == ["training"]
    assert set(found["spire_alarms"].values()) == {0}


def test_a_stuck_rank_stands_out():
    alarms = (Alarm("stuck", "rank 1 on n1 ...", 1), Alarm("loss", "the loss is nan at step 412"))
    found = parsed(metrics_text([replace(TRAINS, state="STUCK", alarms=alarms)]))
    assert found["spire_rank_stuck"] == {("igg", "0"): 0, ("igg", "1"): 1}
    assert {kind for (_, kind), count in found["spire_alarms"].items() if count} == {"stuck", "loss"}
    assert found["spire_images_per_second"] == {("igg",): 0}


def test_ranks_of_a_run_that_does_not_train_have_no_metrics():
    found = parsed(metrics_text([replace(TRAINS, state="stopped")]))
    assert not [name for name in found if name.startswith("spire_rank_")]
    assert found["spire_step"] == {("igg",): 412}


def test_what_is_not_known_is_left_out_and_any_name_is_a_label():
    found = parsed(metrics_text([TRAINS, UNKNOWN]))
    assert found["spire_restarts"] == {("igg",): 3, (UNKNOWN.name,): 0}
    assert found["spire_loss"] == {("igg",): 0.998}
    assert metrics_text([UNKNOWN]).count("# HELP") == metrics_text([TRAINS]).count("# HELP")


def test_the_file_for_node_exporter_is_whole_or_the_old_one(tmp_path, refusal):
    path = tmp_path / "spire.prom"
    write_metrics(path, [UNKNOWN])
    write_metrics(path, [TRAINS])
    assert path.read_text() == metrics_text([TRAINS])
    assert [file.name for file in tmp_path.iterdir()] == ["spire.prom"]
    nowhere = tmp_path / "nowhere" / "spire.prom"
    refusal(RunError, [str(nowhere), "cannot be written"], lambda: write_metrics(nowhere, [TRAINS]))


def test_the_page_lists_the_metrics_that_there_are():
    listed = set(re.findall(r"`(spire_\w+)`", PAGE.read_text()))
    assert listed == {family.name for family in text_string_to_metric_families(metrics_text([TRAINS]))}


def expressions(node: object) -> list[str]:
    """All queries anywhere in a dashboard."""
    if isinstance(node, dict):
        own = [node[key] for key in ("expr", "definition") if key in node]
        return own + [text for value in node.values() for text in expressions(value)]
    return [text for value in node for text in expressions(value)] if isinstance(node, list) else []


def test_the_dashboard_asks_only_for_metrics_and_labels_that_there_are():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    asked = expressions(dashboard)
    assert len(asked) > len(dashboard["panels"]) / 2
    text = metrics_text([TRAINS])
    emitted = {family.name: set(family.samples[0].labels) for family in text_string_to_metric_families(text)}
    used = {name for query in asked for name in re.findall(r"\bspire_\w+", query)}
    assert used <= set(emitted)
    assert len(used) >= 12
    labels = {label for names in emitted.values() for label in names}
    shown = {label for panel in dashboard["panels"] for target in panel.get("targets", []) for label in
             re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}  # fmt: skip
    assert shown <= labels


@pytest.mark.parametrize("key", ["id", "title", "type", "gridPos"])
def test_every_panel_of_the_dashboard_has_what_grafana_needs(key):
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert all(key in panel for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
