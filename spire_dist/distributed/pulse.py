"""A sign of life from every rank, so that one that died or hangs can be named.

A collective that fails says at most which connection broke. So a thread of each rank writes to the ranks' common store, every
`PERIOD_S`, a number that grows, the step and whether the rank waits for others. Who is left after a failure looks twice and
names those whose number stood still (killed, or its machine gone), else those who alone were not waiting (they hang).
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from spire_dist.errors import RankLostError

PERIOD_S = 2.0
POLL_S = 0.05
NOTICE_S = 2.5 * PERIOD_S
"""How long it takes to tell who is missing, once a collective has failed."""


class Waiting:
    """Time this process has spent in collectives, waiting for slower ranks included; on a GPU only the host's part."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.now = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens in the block."""
        start, self.now = time.perf_counter(), True
        yield
        self.now = False  # and stays where it failed: this rank was there
        self.seconds += time.perf_counter() - start


WAITING = Waiting()


class Pulse:
    """The signs of life of `world` ranks; `step` of this one is kept up to date by training."""

    def __init__(self, rank: int, world: int, keeper: str, timeout_s: float) -> None:
        """`keeper` is who keeps the store; after `timeout_s` without a sign a rank is given up."""
        self.rank, self.world, self.keeper = rank, world, keeper
        self.step, self._timeout_s, self._told = 0, timeout_s, 0
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._stopped = threading.Event()
        # A connection of its own: the process group blocks its own while it waits for a key.
        self._store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, timedelta(seconds=timeout_s)
        )
        self._store.set_timeout(timedelta(seconds=PERIOD_S))
        self._beat(0)
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._thread.start()

    def leave(self, reason: str) -> None:
        """Tell the others why this rank ends."""
        with suppress(RuntimeError):  # where its keeper has left, nobody is there to be told
            self._write("left", reason)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def from_first(self, number: int) -> int:
        """What the first rank calls this with; the others wait for it as long as it lives, however long that is.

        Raises RankLostError where it does not.
        """
        self._told += 1
        key = f"pulse{self._attempt}/told/{self._told}"
        if self.rank == 0:
            self._store.set(key, str(number))
            end = time.monotonic() + self._timeout_s
            while number and time.monotonic() < end and self._store.add(f"{key}/heard", 0) < self.world - 1:
                time.sleep(POLL_S)  # it will leave, and may be the store's keeper
            return number
        last, since = None, time.monotonic()
        try:
            while not self._store.check([key]):
                time.sleep(POLL_S)
                sign = self._read("beat", 0)
                last, since = (last, since) if sign == last else (sign, time.monotonic())
                reason = self._read("left", 0)
                if reason is not None or time.monotonic() - since > self._timeout_s:
                    ended = f"ended: {reason}" if reason else f"has given no sign for {self._timeout_s:g} s"
                    raise RankLostError(f"rank {self.rank}: rank 0, for which all wait, {ended}")
            self._store.add(f"{key}/heard", 1)
            return int(self._store.get(key))
        except RuntimeError as error:  # all that the store raises
            if isinstance(error, RankLostError):
                raise
            raise RankLostError(f"rank {self.rank}: {self.keeper} is gone, which kept the ranks together") from error

    def who_is_missing(self) -> str:
        """After a failure: one phrase that names the ranks it came from. Takes `NOTICE_S`."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        try:
            before = {rank: self._read("beat", rank) for rank in others}
            time.sleep(NOTICE_S)
            after = {rank: self._read("beat", rank) for rank in others}
            left = {rank: reason for rank in others if (reason := self._read("left", rank)) is not None}
        except RuntimeError:  # all that dist raises: the store has gone with its keeper
            return f"{self.keeper} is gone, which kept the ranks together"
        silent = [rank for rank in others if rank not in left and before[rank] == after[rank]]
        if silent:
            return f"{_named(silent)} gone or stopped, last seen at step {_last_step(after, silent)}"
        ended = {rank: reason for rank, reason in left.items() if not reason.startswith("rank ")}
        if ended:
            rank, reason = next(iter(ended.items()))
            return f"rank {rank} ended: {reason}"
        signs = {rank: json.loads(sign) for rank, sign in after.items() if sign is not None and rank not in left}
        busy = [rank for rank, (_, _, waiting) in signs.items() if not waiting]
        if busy:
            return f"{_named(busy)} not come to where the others wait, at step {_last_step(after, busy)}"
        return next(iter(left.values()), "the connection between ranks broke, all of them live")

    def _beat_on(self) -> None:
        number = 0
        while not self._stopped.wait(PERIOD_S):
            number += 1
            try:
                self._beat(number)
            except RuntimeError:
                return  # its keeper is gone; the collectives will notice

    def _beat(self, number: int) -> None:
        self._write("beat", json.dumps([number, self.step, WAITING.now]))

    def _key(self, kind: str, rank: int) -> str:
        return f"pulse{self._attempt}/{kind}/{rank}"

    def _write(self, kind: str, text: str) -> None:
        self._store.set(self._key(kind, self.rank), text)

    def _read(self, kind: str, rank: int) -> str | None:
        key = self._key(kind, rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def _last_step(signs: dict[int, str | None], ranks: list[int]) -> int:
    return min((json.loads(sign)[1] for rank in ranks if (sign := signs[rank]) is not None), default=0)
