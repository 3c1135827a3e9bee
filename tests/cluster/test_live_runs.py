"""The live page beside runs that really train: a rank that stands still is named in a browser within half a minute."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cluster.monitored import Monitor, monitoring
from tests.cluster.pages import document, install_browser, screenshot
from tests.cluster.trained import ENDLESS, training, trains, wait_for

NAMED_WITHIN_S = 30.0
STUCK = rf"rank 1 on {re.escape(socket.gethostname())} has given no sign of life for \d+ s; the others wait for it"


@pytest.fixture
def live(tmp_path: Path, tiny_settings: list[str]) -> Iterator[Path]:
    """Two runs of two ranks and one of one rank, which train without end."""
    install_browser()
    endless = [*tiny_settings, *ENDLESS]
    with training(tmp_path, {"first": (2, endless), "second": (2, endless), "lone": (1, endless)}):
        yield tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_names_a_rank_that_stands_still_within_half_a_minute(live):
    states = {name: wait_for(live / name, trains, 300) for name in ("first", "second", "lone")}
    with monitoring(live) as monitor:
        assert stuck(monitor) == []
        before = screenshot(f"{monitor.url}/", live / "before.png")
        pid = states["second"].ranks[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        while not stuck(monitor):
            assert time.monotonic() - stopped < NAMED_WITHIN_S
            time.sleep(0.5)
        page = document(f"{monitor.url}/")
        took = time.monotonic() - stopped
        assert re.findall(rf">([a-z]+)</a>: {STUCK}<", page) == ["second"], page
        assert took < NAMED_WITHIN_S
        after = screenshot(f"{monitor.url}/", live / "after.png")
        print(f"named {took:.1f} s after the stop; pictures: {before} {after}")
        assert red(after) > 100 + 2 * red(before)
        rows = re.findall(r'<tr class="named"><td.*?>(\d+)</td>', document(f"{monitor.url}/run?name=second"))
        assert "1" in rows
        told = status(live)
        assert re.findall(rf"^([a-z]+): {STUCK}$", told, re.MULTILINE) == ["second"]
        assert re.findall(r"^([a-z]+) +(training|STUCK) ", told, re.MULTILINE) == [
            ("first", "training"), ("lone", "training"), ("second", "STUCK"),
        ]  # fmt: skip


def stuck(monitor: Monitor) -> list[str]:
    """Runs in which a rank stands still, as the monitor tells programs; a busy machine may have other alarms."""
    runs = json.loads(monitor.text("/api/runs"))
    return [run["name"] for run in runs for alarm in run["alarms"] if alarm["kind"] in ("stuck", "dead")]


def status(folder: Path) -> str:
    command = [sys.executable, "-m", "spire_dist.cli", "status", str(folder)]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def red(picture: Path) -> int:
    """Pixels in the colour of a grave alarm."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)).sum())
