"""What a run says while it trains: one console line, one JSONL record and TensorBoard scalars per interval.

metrics.jsonl (all ranks together)  ranks/rank-0003.jsonl (each for itself, where there are several)  tb/
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from spire_dist.distributed.collectives import everyones
from spire_dist.distributed.mesh import Mesh
from spire_dist.distributed.pulse import WAITING
from spire_dist.files import write_durably

STRAGGLER = 1.25
"""A rank that works so many times as long as the others is named."""


class RunLog:
    """Counts images and waiting time between log lines and writes all kinds of record; with several ranks one for each."""

    def __init__(
        self,
        run: Path,
        interval_s: float,
        device: torch.device,
        reached: tuple[int, int],
        elapsed_s: float = 0.0,
        mesh: Mesh | None = None,
    ) -> None:
        """`reached` is the (stage, step) the run goes on from; what a crashed process logged beyond it is dropped."""
        self._device, self._mesh = device, mesh or Mesh()
        self._files = []
        if self._mesh.rank == 0:
            self._files.append(_opened(run / "metrics.jsonl", reached))
            self._tensorboard = SummaryWriter(str(run / "tb"))
        if self._mesh.world > 1:
            self._files.append(_opened(run / "ranks" / f"rank-{self._mesh.rank:04d}.jsonl", reached))
        self._interval_s = interval_s
        self._process = psutil.Process()
        self._start = time.monotonic() - elapsed_s
        self.restart_interval()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a restart included."""
        return time.monotonic() - self._start

    def restart_interval(self, waited_s: float = 0.0) -> None:
        """Begin a new interval now; `waited_s` is the data source's running total."""
        self._last, self._waited, self._collective = time.monotonic(), waited_s, WAITING.seconds
        self._images, self._own_images, self._loss, self._steps = 0, 0, 0.0, 0

    def count(self, images: int, loss: float, own_images: int | None = None) -> None:
        """One step of `images` images, of which this rank had `own_images`."""
        self._images, self._loss, self._steps = self._images + images, self._loss + loss, self._steps + 1
        self._own_images += images if own_images is None else own_images

    def due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._last >= self._interval_s

    def write(self, stage: int, step: int, total: int, epoch: float, waited_s: float) -> None:
        """Write the interval's means and begin the next one; all ranks together."""
        if self._steps == 0:
            return
        seconds = time.monotonic() - self._last
        where = {"stage": stage, "step": step, "epoch": round(epoch, 3), "time": round(time.time(), 2)}
        left_s = (total - step) * seconds / self._steps
        own = {
            "images_per_s": round(self._own_images / seconds, 1),
            "wait_share": round((waited_s - self._waited) / seconds, 4),
            "collective_share": round((WAITING.seconds - self._collective) / seconds, 4),
            "memory_gib": round(self._memory_gib(), 3),
            "elapsed_s": round(self.elapsed_s, 2),
        }
        if self._mesh.world > 1:
            _append(self._files[-1], where | own)
        ranks = everyones(own, self._mesh.world_group)
        if self._mesh.rank == 0:
            record = where | {"total": total, "left_s": round(left_s, 1), "loss": self._loss / self._steps} | own
            record["images_per_s"] = round(self._images / seconds, 1)
            if self._mesh.world > 1:
                record |= {"ranks": len(ranks), "memory_gib": max(rank["memory_gib"] for rank in ranks)} | slowest(
                    ranks
                )
            self._tell(record)
        self.restart_interval(waited_s)

    def _tell(self, record: dict[str, Any]) -> None:
        """On the first rank: file, TensorBoard and console."""
        _append(self._files[0], record)
        for key in ("loss", "images_per_s", "wait_share", "collective_share", "memory_gib"):
            self._tensorboard.add_scalar(f"stage{record['stage']}/{key}", record[key], record["step"])
        self._tensorboard.flush()
        line = (
            f"stage {record['stage']}  step {record['step']}/{record['total']}  epoch {record['epoch']:.1f}  "
            f"loss {record['loss']:.5f}  "
            f"{record['images_per_s']:.0f} images/s  wait {100 * record['wait_share']:.0f} %  "
        )
        if "ranks" in record:
            line += f"collectives {100 * record['collective_share']:.0f} %  "
        line += f"{record['memory_gib']:.2f} GiB  {record['left_s']:.0f} s left"
        if record.get("slowest_rank") is not None:
            line += (
                f"  the others wait for rank {record['slowest_rank']}: {record['slowest_times']:.1f} times their work"
            )
        say(line)

    def _memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return self._process.memory_info().rss / 2**30

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        if self._mesh.rank == 0:
            self._tensorboard.close()


def slowest(ranks: list[dict[str, float]]) -> dict[str, float | None]:
    """Who the others wait for, where one rank works (or waits for data) longer than `STRAGGLER` times what is usual."""
    busy = [1 - rank["collective_share"] for rank in ranks]
    number = max(range(len(busy)), key=busy.__getitem__)
    times = busy[number] / max(statistics.median(busy[:number] + busy[number + 1 :]), 1e-6)
    return {"slowest_rank": number, "slowest_times": round(times, 2)} if times > STRAGGLER else {}


def _opened(path: Path, reached: tuple[int, int]) -> TextIO:
    path.parent.mkdir(exist_ok=True)
    _drop_records_beyond(path, reached)
    return open(path, "a")


def _append(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def _drop_records_beyond(path: Path, reached: tuple[int, int]) -> None:
    """Keep the records up to (stage, step): later ones will be made again, and a crash may have cut the last one short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if (record["stage"], record["step"]) <= reached:
            kept.append(line + "\n")
    write_durably(path, "".join(kept))


def say(line: str) -> None:
    """One line to the user."""
    print(line, file=sys.stdout, flush=True)
