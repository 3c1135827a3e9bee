"""One task of a training job on Slurm: its rank as a child process, and what becomes of the job when that has ended.

    srun --kill-on-bad-exit=1 python -m cluster.entry CONFIG RUN [options of train]

`slurm/train.sh` and `spire-dist submit` both end here. Slurm itself starts a job again only after the loss of a node or at the
end of a preemption's grace. After a time limit, a crash, or a save before a preemption one task asks for it (`scontrol
requeue`). Which one is settled by a file; its exit code is the job's, all others end with 0. See docs/cluster.md.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from cluster.lives import note, read_lives, slurm_settings, still_ours
from spire_dist.config import load_config
from spire_dist.distributed.holder import life
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import ConfigError, RankLostError, SpireError, Stopped
from spire_dist.files import write_json
from spire_dist.machine import first_node

SEEN_WITHIN_S = 60.0
"""How long a node may take to see what another one wrote; NFS keeps what it knows of a folder for so long."""
FIRST_DECIDES_S = 10.0
"""How long other tasks leave the decision to the first one, where all ended alike."""
FRUITLESS = 3
"""Crashes without a new save between them after which a job is not queued again."""
POLL_S = 0.2


class Stops:
    """Inside the block stop signals end nobody: they are noted, and handed to the child as TERM while it runs."""

    def __init__(self, after: Any = None) -> None:
        """`after` takes the signals once the block has ended, in place of the old handlers."""
        self.received: list[int] = []
        self._after = after
        self._child: subprocess.Popen | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stops":
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._after or handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child is not None:
            self._child.terminate()

    def run(self, command: Sequence[str]) -> int:
        """Exit code of `command`, negative where a signal ended it."""
        # Slurm signals every process of the step, and USR2 kills one that is still starting; what is ignored stays so in
        # the child until it asks for it.
        self._child = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
        if self.received:  # before there was a child
            self._child.terminate()
        code = self._child.wait()
        self._child = None
        return code


@dataclass(frozen=True)
class Ending:
    """How a task's rank ended, and whether the job is worth starting again."""

    code: int
    why: str
    again: bool


def run_rank(config: Path, run: Path, options: Sequence[str] = ()) -> int:
    """Train as one task of this Slurm job and see to what comes next; returns the task's exit code.

    0 for a task that has nothing to tell. Else 2 for a user's mistake and 1 for a run that is given up, both final; 75 where
    the job has been queued again, or wants to be and cannot be from here; the rank's own code where Slurm has ended the job.
    """
    first = os.environ["SLURM_PROCID"] == "0"
    jobs = run / "jobs"
    with Stops(after=signal.SIG_IGN) as stops:  # srun ends the others when one has ended; their code must be their own
        try:
            requeues = load_config(config, overrides=_settings(options)).job.requeues
            if first:
                _begin(jobs)
            else:
                _wait_to_see(jobs)
            choose_meeting_place()
        except SpireError as error:
            print(f"spire-dist: {error}", file=sys.stderr, flush=True)
            return error.exit_code if _decides(jobs, first) else 0
        command = [sys.executable, "-m", "spire_dist.cli", "train", str(config), "--run", str(run), *options]
        ending = _ending(stops.run(command), stops)
        if ending.code == RankLostError.exit_code:
            _leave_it_to_others(jobs, stops)
            first = True  # whoever is left
        if ending.code == 0 and not first:
            return 0
        if not _decides(jobs, first or not _alike(ending)):
            return 0
        return _decide(run, ending, requeues, config)


def _settings(options: Sequence[str]) -> list[str]:
    """What stands after every --set."""
    return [value for option, value in pairwise(options) if option == "--set"]


def _ending(code: int, stops: Stops) -> Ending:
    if code == 0:
        return Ending(0, "all is done", again=False)
    if code == Stopped.exit_code:
        return Ending(code, "stopped on request and saved", again=True)
    if code == SpireError.exit_code:
        return Ending(code, "a mistake in the settings or files, told above", again=False)
    if code == RankLostError.exit_code:
        return Ending(code, "other ranks were lost", again=True)
    if code < 0 and stops.received and -code in STOP_SIGNALS:
        return Ending(Stopped.exit_code, "stopped on request before the first step or after the last", again=True)
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ending(code if code > 0 else 128 - code, f"rank {os.environ['SLURM_PROCID']} was {how}", again=True)


def _alike(ending: Ending) -> bool:
    """Whether all ranks end in this way together."""
    return ending.code in (0, SpireError.exit_code, Stopped.exit_code)


def _decides(jobs: Path, at_once: bool) -> bool:
    """Whether this task, and no other of this life, decides what comes next. Others than the first wait for that one."""
    claim = jobs / f"{life()}.claim"
    until = time.monotonic() + (0 if at_once else FIRST_DECIDES_S)
    while time.monotonic() < until and not claim.exists():
        time.sleep(POLL_S)
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        claim.open("x").close()
    except OSError:  # there already; or a folder nobody can write to, which they all tell
        return not claim.exists()
    return True


def _leave_it_to_others(jobs: Path, stops: Stops) -> None:
    """After the loss of other ranks: wait until the task of a dead one decides, or Slurm ends this life of the job.

    Slurm tells of a dead node only after SlurmdTimeout, and then starts the job again by itself. Asked before it knows, it
    starts the job on what it still believes in: Slurm 22.05 then fails it ("Invalid generic resource"). With
    --kill-on-bad-exit a signal comes at once where a task died and its node did not.
    """
    timeout = int(slurm_settings().get("SlurmdTimeout", "300 sec").split()[0])
    until = time.monotonic() + 1.5 * timeout + 30
    while time.monotonic() < until and not stops.received and not (jobs / f"{life()}.claim").exists():
        time.sleep(POLL_S)


def _decide(run: Path, ending: Ending, requeues: int, config: Path) -> int:
    """Queue the job again, or say why not; returns the exit code."""
    jobs, job = run / "jobs", os.environ["SLURM_JOB_ID"]
    ours = ending.code == 0 or still_ours(job)
    if ours and not ending.again:
        note(jobs, "ended", code=ending.code, why=ending.why, then="done" if ending.code == 0 else "not queued again")
        return ending.code
    saved = (run / "latest").read_text().strip() if (run / "latest").exists() else ""
    told = {"code": ending.code, "why": ending.why, "saved": saved}
    lives = [record for record in read_lives(run) if record["job"] == job and record["event"] == "ended"]
    if not ours:
        note(jobs, "ended", **told, then="Slurm has ended or requeued the job itself")
        return ending.code
    refused = _refused(ending, lives, requeues, saved)
    if not refused and shutil.which("scontrol") is None:
        again = f"spire-dist submit {config} --run {run}"
        _say(f"{ending.why}; scontrol is not on this node: unless the site requeues exit code 75, run: {again}")
        note(jobs, "ended", **told, then=f"asked for by exit code 75; else run: {again}")
        return Stopped.exit_code
    if not refused:
        note(jobs, "ended", **told, then="requeued")  # first: what follows may end this process
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if asked.returncode <= 0:  # below: ended by the very requeue, which signals all processes of the job
            _say(f"{ending.why}; job {job} is queued again")
            return Stopped.exit_code
        refused = f"Slurm refuses: {' '.join(asked.stderr.split())}"
    _say(f"{ending.why}; not queued again: {refused}. To go on: spire-dist submit {config} --run {run}")
    note(jobs, "ended", **told, then=f"not queued again: {refused}")
    return 1  # a site's RequeueExit must not make a loop of it


def _refused(ending: Ending, lives: list[dict[str, Any]], requeues: int, saved: str) -> str:
    """Why the job is not to be queued again; empty where it is."""
    done = sum(record["then"] == "requeued" for record in lives)
    if done >= requeues:
        return f"it was {done} times, job.requeues = {requeues}"
    before = lives[-FRUITLESS + 1 :]
    crashes = [record for record in before if record["code"] != Stopped.exit_code and record.get("saved") == saved]
    if ending.code != Stopped.exit_code and len(crashes) == FRUITLESS - 1:
        return f"{FRUITLESS} crashes without a save between them"
    return ""


def _begin(jobs: Path) -> None:
    """On the first task: tell that a life of the job begins."""
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        write_json(jobs / "job.json", {"id": os.environ["SLURM_JOB_ID"], "cluster": "slurm", "time": time.time()})
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        note(jobs, "started", nodes=nodes, ranks=int(os.environ["SLURM_NTASKS"]))
    except OSError as error:
        raise ConfigError(
            f"{jobs}: cannot be written on {_node()} ({error.strerror}); choose a --run on a file system that all nodes share"
        ) from error


def _wait_to_see(jobs: Path) -> None:
    """On other tasks: see that the first one's folder is here too."""
    until = time.monotonic() + SEEN_WITHIN_S
    while not any(f"{r['job']}-{r['restart']}" == life() for r in read_lives(jobs.parent)):
        if time.monotonic() > until:
            raise ConfigError(
                f"{jobs.parent}: {_node()} does not see what {first_node(os.environ['SLURM_STEP_NODELIST'])} wrote there "
                f"{SEEN_WITHIN_S:.0f} s ago; choose a --run on a file system that all nodes share"
            )
        time.sleep(POLL_S)


def choose_meeting_place() -> None:
    """Name the first rank's node to all: by its own name where that means something here, else by srun's address."""
    name = first_node(os.environ.get("SLURM_STEP_NODELIST", "localhost"))
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        name = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", name)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch tells of every closed connection


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _say(line: str) -> None:
    print(f"spire-dist: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """`python -m cluster.entry CONFIG RUN [options of train]`."""
    if len(sys.argv) < 3 or "SLURM_PROCID" not in os.environ:
        _say("usage, in a Slurm job: srun python -m cluster.entry CONFIG RUN [options of train]")
        sys.exit(2)
    sys.exit(run_rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))


if __name__ == "__main__":
    main()
