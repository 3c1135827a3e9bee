"""`doctor` under srun with several tasks: all nodes are examined, meet as for training, and compare what they have.

The ranks talk through torch's key-value store on the first one, each wait with its own limit, so that a rank that is missing is
named instead of waited for. The collectives run in child processes (`doctor_collectives.py`).
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster import doctor_compare as compare
from cluster import doctor_machine, doctor_places
from cluster.doctor_here import EXAMINE_S, examine_here, read_config
from cluster.doctor_tools import ROOT, Check, within
from spire_dist.config import RunConfig

MEET_S = 30.0
"""How long ranks may take to start, one after the other."""
LOCAL_S = EXAMINE_S + 10
CHILD_S = 120.0
SEEN_S = 20.0
"""How long a file may take to appear on another node. Longer waits break runs."""


@dataclass(frozen=True)
class Place:
    """A rank's place in the step."""

    rank: int
    world: int
    local_rank: int
    node: str


class Meeting:
    """What ranks tell each other, through the store that the first one keeps."""

    def __init__(self, place: Place, address: str, port: int) -> None:
        """Raises what torch's store raises, or TimeoutError."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        def meet() -> TCPStore:
            patience = timedelta(seconds=MEET_S)
            return TCPStore(address, port, place.world, place.rank == 0, patience, wait_for_workers=False)

        self._store, _ = within(1.5 * MEET_S, meet)  # what keeps the port may take a caller and never answer
        self._rank = place.rank

    def tell(self, topic: str, what: object) -> None:
        """Say something that others may wait for."""
        self._store.set(f"doctor/{topic}/{self._rank}", json.dumps(what))

    def heard(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What those of the ranks said who said something in time."""
        until, found = time.monotonic() + seconds, {}
        for rank in ranks:
            key = f"doctor/{topic}/{rank}"
            with suppress(RuntimeError):
                self._store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
                found[rank] = json.loads(self._store.get(key))
        return found


def examine_together(config: Path | None, run: Path | None) -> list[Check]:
    """Findings of all ranks of this step, on the first; on others nothing, or why the first cannot be reached."""
    from cluster.entry import choose_meeting_place

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    choose_meeting_place()
    from spire_dist.distributed.mesh import launch_variables

    launched = launch_variables(os.environ)
    os.environ |= launched
    rank, world, local_rank = (int(launched[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = Place(rank, world, local_rank, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    address, port = launched["MASTER_ADDR"], int(launched["MASTER_PORT"])
    where = f"{address}:{port}"
    settings, wrong = read_config(config)
    run = run or Path("run")
    free = doctor_places.ports(os.environ) if rank == 0 else []
    try:
        meeting = Meeting(place, address, port)
    except (RuntimeError, TimeoutError) as error:
        return _nobody_met(place, where, error, free + examine_here(settings, run, None) + wrong)
    meeting.tell("hello", place.node)
    if rank > 0:
        present = meeting.heard("present", [0], 1.5 * MEET_S).get(0)
        if present is None:
            return [_unreached(place, where, "it went away")]
        _take_part(meeting, place, settings, run, dict(present), complete=len(present) == world)
        meeting.heard("done", [0], LOCAL_S)
        meeting.tell("bye", True)
        return []
    nodes = meeting.heard("hello", range(world), MEET_S)
    meeting.tell("present", sorted(nodes.items()))
    _take_part(meeting, place, settings, run, nodes, complete=len(nodes) == world)
    checks = _all_findings(meeting, place, nodes, where) + free + wrong
    meeting.tell("done", True)
    meeting.heard("bye", nodes.keys() - {0}, 5)  # the store goes with this process
    return checks


def _nobody_met(place: Place, where: str, error: Exception, own: list[Check]) -> list[Check]:
    reason = " ".join(str(error).split())[:160]
    if place.rank > 0:
        return [_unreached(place, where, reason)]
    fix = "see the line on ports; else export MASTER_ADDR=<address of this node> MASTER_PORT=<a free port> before srun"
    return [*own, Check("meeting", "MISS", f"rank 0 on {place.node} cannot open {where} ({reason})", fix)]


def _unreached(place: Place, where: str, reason: str) -> Check:
    fix = "a firewall between nodes, or the first node's name: export MASTER_ADDR=<its address> before srun"
    return Check("meeting", "MISS", f"rank {place.rank} on {place.node} cannot reach rank 0 at {where} ({reason})", fix)


# ---- every rank


def _leaders(nodes: Mapping[int, str]) -> list[int]:
    """The first rank of each node."""
    return [rank for rank in sorted(nodes) if nodes[rank] not in {nodes[other] for other in nodes if other < rank}]


def _take_part(
    meeting: Meeting, place: Place, settings: RunConfig | None, run: Path, nodes: Mapping[int, str], *, complete: bool
) -> None:
    """Examine this rank's machine, meet the others in collectives, compare files and clocks; tell the first rank."""
    lines: list[dict[str, Any]] = []
    together = threading.Thread(target=lambda: lines.extend(_child()), daemon=True)
    if complete:
        together.start()
        together.join(CHILD_S + 5)
    told = {name: found for line in lines for name, found in line.items()}
    facts = told.get("facts") or doctor_machine.ask_torch()
    leaders = _leaders(nodes)
    if place.rank in leaders:
        found = examine_here(settings, run, None, facts)
    else:
        found = doctor_machine.gpus(facts, doctor_machine.gpus_of_machine(), os.environ, False)
    meeting.tell("checks", [asdict(check) for check in found])
    report = {name: told.get(name) for name in ("gloo", "nccl", "error")} | {"local": place.local_rank}
    uuids = [gpu["uuid"] for gpu in facts.get("gpus", [])]
    meeting.tell("report", report | {"versions": doctor_machine.versions(), "gpus": uuids})
    if place.rank in leaders and len(leaders) > 1:
        _exchange_files(meeting, place, leaders, doctor_places.standing(run))
        _exchange_times(meeting, place, leaders)


def _child() -> list[dict[str, Any]]:
    """The lines of `doctor_collectives`, as far as it came."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.doctor_collectives"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        out, errors = child.communicate(timeout=CHILD_S)
        late = f"ended with exit code {child.returncode}: {errors.decode(errors='replace').strip()[-160:]}"
    except subprocess.TimeoutExpired as error:
        child.kill()
        out, late = error.stdout or b"", f"no answer within {CHILD_S:g} s"
    lines = [json.loads(line) for line in out.decode(errors="replace").splitlines() if line.startswith("{")]
    return lines if child.returncode == 0 else [*lines, {"error": late}]


def _exchange_files(meeting: Meeting, place: Place, leaders: Sequence[int], folder: Path) -> None:
    """Each node writes and locks a file; the first one looks for all of them, the others for its."""
    own = folder / f".spire-doctor-{os.environ.get('SLURM_JOB_ID', '')}-{place.rank}-{os.getpid()}"
    try:
        with own.open("x") as file:
            file.write(own.name)
            file.flush()
            os.fsync(file.fileno())
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            meeting.tell("wrote", str(own))
            looked = [
                rank for rank in leaders if rank != place.rank and (place.rank == leaders[0] or rank == leaders[0])
            ]
            written = meeting.heard("wrote", looked, LOCAL_S)
            meeting.tell("saw", {rank: _look_for(Path(path)) for rank, path in written.items()})
            meeting.heard("saw", leaders, LOCAL_S)
    except OSError as error:
        meeting.tell("wrote", str(own))
        meeting.tell("saw", {"error": error.strerror})
    finally:
        own.unlink(missing_ok=True)


def _look_for(path: Path) -> dict[str, Any]:
    start = time.monotonic()
    while time.monotonic() - start < SEEN_S:
        with suppress(OSError):
            if path.read_text() == path.name:
                seconds = time.monotonic() - start
                return {"seconds": seconds, "locked": not doctor_places.lock_is_free(path)}
        time.sleep(0.05)
    return {"seconds": None}


def _exchange_times(meeting: Meeting, place: Place, leaders: Sequence[int]) -> None:
    """Tell how far this clock is ahead of the first one's, give or take the milliseconds of a message."""
    if place.rank == leaders[0]:
        meeting.heard("ready", leaders[1:], LOCAL_S)
        meeting.tell("clock", time.time())
        return
    meeting.tell("ready", True)
    first = meeting.heard("clock", [leaders[0]], LOCAL_S)
    now = time.time()
    if first:
        meeting.tell("ahead", now - first[leaders[0]])


# ---- the first rank


def _all_findings(meeting: Meeting, place: Place, nodes: dict[int, str], where: str) -> list[Check]:
    """What all have told, put together."""
    said = meeting.heard("checks", nodes, LOCAL_S)
    reports = meeting.heard("report", nodes, 5)
    leaders = _leaders(nodes)
    saw, ahead = meeting.heard("saw", leaders[1:] and leaders, 5), meeting.heard("ahead", leaders[1:], 5)
    checks = [
        *compare.merge([(nodes[rank], [Check(**one) for one in found]) for rank, found in said.items()]),
        compare.met(place.world, nodes, set(reports), where),
        compare.same_versions(nodes, reports),
        *compare.a_gpu_each(nodes, reports),
        *(compare.summed(nodes, reports) if len(nodes) == place.world else []),
        *(compare.seen(nodes, saw) if len(leaders) > 1 else []),
        *(compare.same_time(nodes, ahead) if len(leaders) > 1 else []),
    ]
    return compare.settled(checks)
