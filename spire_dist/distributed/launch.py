"""Several ranks on this machine: started together, ended together, started again from the last save after a crash.

torchrun does this too, and for several machines; but to it a run that stopped on request (exit code 75), or refused its
settings (2), is one that crashed, and it would start again.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from spire_dist.distributed.pulse import NOTICE_S
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import SpireError, Stopped

GRACE_S = 3 * NOTICE_S
"""How long the others of a rank that died may take to say so."""
POLL_S = 0.1


def launch(command: list[str], processes: int, restarts: int) -> int:
    """Run `command` in so many processes, each with its place in the environment; returns the exit code for all of them.

    Signals to stop are handed on. A crash of one ends all, and starts them again at most `restarts` times.
    """
    running: list[subprocess.Popen] = []
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
    try:
        for attempt in range(restarts + 1):
            running[:] = _start(command, processes)
            codes = _wait(running)
            crashed = [rank for rank, code in enumerate(codes) if code not in (0, Stopped.exit_code)]
            if not crashed:
                return max(codes)
            if asked and all(code in (0, Stopped.exit_code, *(-number for number in STOP_SIGNALS)) for code in codes):
                return Stopped.exit_code  # before they had begun
            if SpireError.exit_code in codes:  # its settings or its files will not be better the next time
                return SpireError.exit_code
            killed = next((rank for rank in crashed if codes[rank] < 0), crashed[0])
            more = attempt < restarts and not asked
            again = f"starting all again ({attempt + 1} of {restarts})" if more else "giving up"
            print(f"rank {killed} of {processes} {_how(codes[killed])}; {again}", file=sys.stderr, flush=True)
            if asked:
                break
        return 1
    finally:
        for process in running:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(command: list[str], processes: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    quiet = {
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    }  # torch tells of every closed connection
    places = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    # A session of their own: Ctrl-C reaches them once, from here.
    return [
        subprocess.Popen(
            command, env=os.environ | quiet | {k: str(v) for k, v in place.items()}, start_new_session=True
        )
        for place in places
    ]


def _wait(running: list[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended; what still runs long after another one crashed is killed."""
    crashed_at: float | None = None
    while (codes := [process.poll() for process in running]).count(None):
        crashed = any(code not in (None, 0, Stopped.exit_code) for code in codes)
        crashed_at = crashed_at or (time.monotonic() if crashed else None)
        if crashed_at is not None and time.monotonic() - crashed_at > GRACE_S:
            for process in running:
                process.kill()
        time.sleep(POLL_S)
    return [process.returncode for process in running]


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
