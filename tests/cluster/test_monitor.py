"""`spire-dist monitor`: who may look, what it answers, what a browser makes of it, and that it changes nothing."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.monitor import Gate
from cluster.monitor_pages import MOST_ALARMS_OF_MANY, Pages
from spire_dist.errors import RunError
from tests.cluster.monitored import MONITOR, Monitor, make_run, monitoring, wait_for, write_beats
from tests.cluster.pages import document, install_browser

TOKEN = "a-token-of-the-tests"
PAGES = ["/", "/run?name=two", "/run?name=two&over=time", "/run?name=many", "/run?name=lone", "/nowhere"]


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """`two` of two ranks and `many` of 40, in each of which one is silent, and `lone` of one live; `failed` has ended."""
    folder, ended = tmp_path / "runs", threading.Event()
    alive: dict[str, tuple[int, list[int]]] = {"two": (2, [1]), "many": (40, [7]), "lone": (1, [])}
    for name, (world, silent) in alive.items():
        make_run(folder / name, world=world, silent=silent)
    make_run(folder / "failed", state="failed")

    def live() -> None:
        while not ended.wait(1):
            for name, (world, silent) in alive.items():
                write_beats(folder / name, world, silent)

    heart = threading.Thread(target=live)
    heart.start()
    yield folder
    ended.set()
    heart.join()


@pytest.fixture
def monitor(runs: Path) -> Iterator[Monitor]:
    with monitoring(runs) as found:
        yield found


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitor]:
    """Of runs in which nothing happens."""
    folder = tmp_path_factory.mktemp("still")
    for name, world in {"two": 2, "many": 40, "lone": 1}.items():
        make_run(folder / name, world=world)
    with monitoring(folder) as found:
        yield found


# --- what it answers -------------------------------------------------------------------------------------------------


def test_the_overview_names_all_runs_and_what_is_wrong(monitor, runs):
    page = monitor.text("/")
    assert "4 runs" in page
    for name in ("two", "many", "lone", "failed"):
        assert f'href="run?name={name}"' in page
    assert re.search(r"two</a>: rank 1 on n2 has given no sign of life for \d+ s; the others wait for it", page)
    make_run(runs / "sweep" / "late")
    wait_for(lambda: "run?name=late" in monitor.text("/"))
    for file in (runs / "failed").iterdir():
        (file.unlink if file.is_file() else file.rmdir)()
    wait_for(lambda: "run?name=failed" not in monitor.text("/"))
    assert monitor.ask("/run?name=failed").status == 404


def test_a_run_has_its_curves_its_ranks_and_why_there_is_no_picture(monitor):
    page = monitor.text("/run?name=two")
    assert page.count('<svg class="chart"') == 6
    for title in ("loss", "images/s", "share of the time spent waiting", "waiting for data, each rank"):
        assert f'aria-label="{title}"' in page
    assert "stage 2</text>" in page
    assert "No pictures: no checkpoint yet." in page
    rows = re.findall(r"<tr (.*?)><td.*?>(\d+)</td><td>(.*?)</td>", page)
    assert rows == [("", "0", "n1"), ('class="named"', "1", "n2")]
    assert monitor.text("/run?name=lone").count('<svg class="chart"') == 3
    assert monitor.text("/run?name=two&over=time") != page


def test_of_many_ranks_there_is_a_band_and_those_that_matter(monitor):
    page = monitor.text("/run?name=many")
    assert page.count('class="band" d=') == 3
    assert set(re.findall(r'data-name="([^"]*)"', page)) >= {"median", "rank 7"}
    cells = re.search(r'<div class="cells".*?</div>', page, re.DOTALL)
    assert cells
    assert cells[0].count("<i ") == 40
    assert re.findall(r"<tr (.*?)><td.*?>(\d+)</td>", page) == [('class="named"', "7")]


def test_many_alarms_of_one_run_are_counted(tmp_path):
    make_run(tmp_path / "runs" / "bad", world=12, silent=range(1, 12))
    with Pages([tmp_path / "runs"]) as pages:
        count = len(pages.states()[0].alarms)
        page = pages.reply("/", {}).body.decode()
    assert count > MOST_ALARMS_OF_MANY
    assert page.count("<li ") == MOST_ALARMS_OF_MANY
    assert f"and {count - MOST_ALARMS_OF_MANY + 1} more" in page


def test_json_is_what_status_says_and_knows_no_nan(monitor, runs):
    line = json.dumps({"stage": 2, "step": 210, "loss": math.nan, "images_per_s": math.inf})
    with open(runs / "lone" / "metrics.jsonl", "a") as file:
        file.write(line + '\n{"stage": 2, "st')

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    reply = monitor.ask("/api/run?name=lone")
    assert reply.getheader("Content-Type") == "application/json"
    found = json.loads(reply.text, parse_constant=refuse)
    assert (found["state"]["name"], found["records"][-1]["loss"], found["ranks"]) == ("lone", None, {})
    told = subprocess.run([*MONITOR[:-1], "status", "--json", runs], capture_output=True, text=True, check=True).stdout
    keys = ("name", "state", "stage", "step", "total", "restarts")
    wanted = [[run[key] for key in keys] for run in json.loads(told)]
    wait_for(lambda: [[run[key] for key in keys] for run in json.loads(monitor.text("/api/runs"))] == wanted)
    assert monitor.text("/run?name=lone").count('<svg class="chart"') == 3


def test_metrics_are_prometheus_text(monitor):
    reply = monitor.ask("/metrics")
    assert reply.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    steps = {sample.labels["run"]: sample.value for sample in families["spire_step"].samples}
    assert steps == {"two": 200, "many": 200, "lone": 200, "failed": 200}


def test_metrics_also_come_to_a_file(runs, tmp_path):
    with monitoring(runs, "--metrics-file", tmp_path / "spire.prom"):
        assert 'spire_step{run="lone"} 200.0' in (tmp_path / "spire.prom").read_text()


@pytest.mark.parametrize(
    "path",
    ["/run", "/run?name=none", "/run?name=../../etc", "/../etc/passwd", "/style.css/..", "/templates/run.html", "/run.html",
     "/picture?name=lone", "/picture?name=lone&what=scatter", "/api", "/api/run?name=", "/?"],
)  # fmt: skip
def test_what_is_not_there(still, path):
    reply = still.ask(path)
    assert reply.status == (200 if path == "/?" else 404)
    assert "Traceback" not in reply.text


def test_names_are_text_and_nothing_else(tmp_path):
    name = '<b onclick=x>&"%20?#'
    make_run(tmp_path / "runs" / name, world=2, silent=[1])
    with monitoring(tmp_path / "runs") as monitor:
        page = monitor.text("/")
        assert "<b onclick" not in page
        assert f'href="run?name={quote(name)}"' in page
        assert "&lt;b onclick=x&gt;&amp;" in monitor.text(f"/run?name={quote(name)}")


def test_a_checkpoint_that_cannot_be_read_is_told(monitor, runs):
    (runs / "lone" / "latest").write_text("step-100000010\n")
    wait_for(lambda: "step-100000010 cannot be drawn: " in monitor.text("/run?name=lone"), 90)


def test_looking_changes_nothing(tmp_path):
    runs = tmp_path / "runs"
    for name in ("two", "many", "lone"):
        make_run(runs / name, world=2)
    before = {path: path.stat().st_mtime_ns for path in sorted(runs.rglob("*"))}
    with monitoring(runs) as monitor:
        for path in (*PAGES, "/api/runs", "/api/run?name=two", "/metrics"):
            monitor.ask(path)
    assert {path: path.stat().st_mtime_ns for path in sorted(runs.rglob("*"))} == before


# --- who may look ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitor]:
    with monitoring(make_run(tmp_path_factory.mktemp("locked") / "run"), SPIRE_TOKEN=TOKEN) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=", {}),
        ("/?token=a-token-of-the-test", {}),
        ("/", {"Authorization": "Bearer wrong"}),
        ("/", {"Authorization": TOKEN}),
        ("/", {"Authorization": f"Basic {TOKEN}"}),
        ("/", {"Cookie": f"spire={TOKEN}"}),
        ("/", {"Cookie": "=;;\x01"}),
        ("/api/runs", {}),
        ("/api/run?name=run", {}),
        ("/metrics", {}),
        ("/picture?name=run&what=scatter", {}),
        ("/nowhere", {}),
    ],
)
def test_without_the_token_nothing_is_told(locked, path, headers):
    reply = locked.ask(path, **headers)
    assert (reply.status, reply.getheader("Set-Cookie")) == (401, None)
    assert reply.getheader("WWW-Authenticate", "").startswith("Bearer")
    assert "stage" not in reply.text


def test_the_page_that_asks_for_the_token_has_its_style(locked):
    replies = [locked.ask(path) for path in ("/style.css", f"/style.css?token={TOKEN}", "/icon.svg")]
    assert [(reply.status, reply.getheader("Set-Cookie")) for reply in replies] == [(200, None)] * 3


def test_the_token_opens_and_a_cookie_remembers_it(locked):
    assert f"token={TOKEN}" in locked.said
    reply = locked.ask(f"/?token={TOKEN}")
    cookie = reply.getheader("Set-Cookie", "")
    assert reply.status == 200
    assert set(cookie.split("; ")[1:]) == {"HttpOnly", "SameSite=Strict", "Path=/"}
    assert TOKEN not in cookie
    pair = cookie.partition(";")[0]
    assert locked.ask("/", Cookie=f"other=1; {pair}").status == 200
    assert locked.ask("/", Cookie=pair[:-1]).status == 401
    assert locked.ask("/metrics", Authorization=f"Bearer {TOKEN}").status == 200
    assert locked.ask("/", Host="anything.example", Authorization=f"Bearer {TOKEN}").status == 200


def test_beyond_this_machine_there_is_always_a_token(runs):
    with monitoring(runs, "--host", "0.0.0.0", SPIRE_TOKEN="") as monitor:
        token = urlsplit(monitor.said.split()[-1]).query.partition("=")[2]
        assert len(token) >= 32
        assert monitor.ask("/").status == 401
        assert monitor.ask(f"/?token={token}").status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200), ("evil.example", 403),
     ("localhost.evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("[", 403)],
)  # fmt: skip
def test_without_a_token_another_name_is_refused(host, status):
    reply = Gate(None, local=True, cookie="spire").refusal("/", {"Host": host}, {})
    assert (200 if reply is None else reply.status) == status


def test_the_host_is_checked_on_the_wire(still):
    assert still.ask("/", Host="evil.example").status == 403
    assert still.ask("/api/runs", Host="evil.example").status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "SOMETHING"])
def test_only_looking_is_possible(still, method):
    reply = still.ask("/", method, Content_Length="0")
    assert reply.status in (405, 501)
    assert reply.status == 501 or reply.getheader("Allow") == "GET, HEAD"


def test_head_is_get_without_the_body(still):
    for path in ("/style.css", "/nowhere"):
        got, head = still.ask(path), still.ask(path, "HEAD")
        assert (head.status, head.getheader("Content-Length")) == (got.status, got.getheader("Content-Length"))
        assert (head.text, got.text == "") == ("", False)


# --- what a browser is given -----------------------------------------------------------------------------------------


def test_nothing_comes_from_elsewhere(still):
    for path in (*PAGES, "/style.css", "/live.js", "/icon.svg"):
        reply = still.ask(path)
        assert "default-src 'self'" in reply.getheader("Content-Security-Policy", "")
        assert reply.getheader("X-Content-Type-Options") == "nosniff"
        text = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?:|url\(|@import|(?:src|href)=\"(?:/|data:)", text), path
        assert not re.findall(r"<[^>]* (?:style|on\w+)=", text), path  # the policy would refuse it
    assert still.ask("/", Accept_Encoding="gzip").getheader("Content-Encoding") == "gzip"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_browser_shows_it_keeps_it_fresh_and_forgets_the_token(runs):
    install_browser()
    with monitoring(runs, "--token", TOKEN) as monitor:
        page = document(f"{monitor.url}/?token={TOKEN}")  # fetches itself again: by the cookie
        assert "4 runs" in page
        assert TOKEN not in page
        assert re.search(r'<div id="lost"[^>]* hidden', page), "could not refresh itself"
        assert "asks for the token" in document(f"{monitor.url}/")
    with monitoring(runs) as monitor:
        for path in PAGES[1:]:
            assert "spire_dist" in document(monitor.url + path)  # which fails where the policy refuses something


# --- beginning and end -----------------------------------------------------------------------------------------------


def refused(*words: str | Path, **environment: str) -> str:
    ran = subprocess.run([*MONITOR, *words], capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    return ran.stderr


def test_what_cannot_be_served_is_one_line(runs, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: in use on 127.0.0.1" in refused(runs, "--port", port)
    assert "--port 99999: choose one from 1" in refused(runs, "--port", "99999")
    assert "--host no.such.host.invalid: not an address" in refused(runs, "--host", "no.such.host.invalid")
    assert "--host 192.0.2.1: cannot be listened on" in refused(runs, "--host", "192.0.2.1", SPIRE_TOKEN=TOKEN)
    assert "of 5 characters" in refused(runs, "--token", "short")
    assert "no such folder" in refused(tmp_path / "nothing")
    assert "cannot be written" in refused(runs, "--port", "0", "--metrics-file", tmp_path / "nothing" / "a.prom")


def test_an_empty_folder_waits_for_its_first_run(tmp_path):
    with monitoring(tmp_path) as monitor:
        assert monitor.said.startswith("0 runs")
        assert "No run here yet" in monitor.text("/")
        assert json.loads(monitor.text("/api/runs")) == []
        make_run(tmp_path / "first")
        wait_for(lambda: "run?name=first" in monitor.text("/"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_well_while_a_picture_is_drawn(runs, number):
    (runs / "lone" / "latest").write_text("step-100000010\n")
    with monitoring(runs) as monitor:
        assert "is being drawn" in monitor.text("/run?name=lone")
        monitor.process.send_signal(number)
        assert monitor.process.wait(30) == 0


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        Pages([tmp_path / "nothing"])
