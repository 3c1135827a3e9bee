"""A monitor as a user starts it, and runs with curves for it to look at."""

import http.client
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spire_dist.files import replacing

MONITOR = [sys.executable, "-m", "spire_dist.cli", "monitor"]
SILENCE_S = 100.0
"""Age of the last news of a rank that is silent, and of the run, which waits for it."""


def make_run(
    run: Path, *, world: int = 1, lines: int = 40, state: str = "training", silent: Collection[int] = ()
) -> Path:
    """A run in the middle of stage 2, each rank with a sign of life of this moment, but `silent` with one of long ago."""
    now, half = time.time() - (SILENCE_S if silent else 0), lines // 2
    (run / "ranks").mkdir(parents=True)
    records = []
    for i in range(lines):
        where = {"stage": 1 + (i >= half), "step": 10 * (i % half + 1), "epoch": i / 2, "time": now - lines + i}
        shares = {"wait_share": 0.02, "collective_share": 0.2, "memory_gib": 1.5, "elapsed_s": 1.0 + i}
        records.append(where | {"images_per_s": 500.0 + i} | shares)
        records[-1] |= {"total": 20 * half, "left_s": 60.0, "loss": 1 + math.exp(-i)}
    write_lines(run / "metrics.jsonl", [record | ({"ranks": world} if world > 1 else {}) for record in records])
    for rank in range(world if world > 1 else 0):
        write_lines(run / "ranks" / f"rank-{rank:04d}.jsonl", records)
    status = {
        "state": state,
        "stage": 2,
        "step": 10 * half,
        "time": "2026-01-01T00:00:00+0000",
        "pid": 1,
        "message": "",
    }
    (run / "STATUS.json").write_text(json.dumps(status))
    if state == "training":
        write_beats(run, world, silent)
    return run


def write_beats(run: Path, world: int, silent: Collection[int]) -> None:
    """A sign of life of each rank, of this moment."""
    now, step = time.time(), json.loads((run / "STATUS.json").read_text())["step"]
    for rank in range(world):
        said = now - SILENCE_S if rank in silent else now
        sign = {"time": said, "rank": rank, "world": world, "stage": 2, "step": step, "waiting": rank not in silent}
        with replacing(run / "ranks" / f"beat-{rank:04d}.json") as partial:
            partial.write_text(
                json.dumps(sign | {"host": f"n{rank + 1}", "pid": 4000 + rank, "job": None, "restart": 0})
            )
            os.utime(partial, (said, said))


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class Monitor:
    """A monitor that runs."""

    port: int
    said: str
    process: subprocess.Popen[str]

    def ask(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """Its answer, with the text as `.text`; a Host header in place of the own one where given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        reply = connection.getresponse()
        reply.text = reply.read().decode(errors="replace")  # type: ignore[attr-defined]
        connection.close()
        return reply

    def text(self, path: str) -> str:
        reply = self.ask(path)
        assert reply.status == 200, reply.text  # type: ignore[attr-defined]
        return reply.text  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"


@contextmanager
def monitoring(*words: str | Path, **environment: str) -> Iterator[Monitor]:
    """A monitor as a user starts it; ends well."""
    process = subprocess.Popen(
        [*MONITOR, *words, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/\S*", said)
        assert found, process.communicate(timeout=60)
        yield Monitor(int(found[1]), said, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], patience_s: float = 30) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.3)
