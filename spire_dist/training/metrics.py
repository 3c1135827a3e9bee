"""What a run says while it trains: one console line, one JSONL record and TensorBoard scalars per interval."""

import json
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from spire_dist.files import write_durably


class RunLog:
    """Counts images and waiting time between log lines and writes all three kinds of record."""

    def __init__(
        self, run: Path, interval_s: float, device: torch.device, reached: tuple[int, int], elapsed_s: float = 0.0
    ) -> None:
        """`reached` is the (stage, step) the run goes on from; what a crashed process logged beyond it is dropped."""
        _drop_records_beyond(run / "metrics.jsonl", reached)
        self._device = device
        self._jsonl = open(run / "metrics.jsonl", "a")  # noqa: SIM115 - lives as long as the run
        self._tensorboard = SummaryWriter(str(run / "tb"))
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
        self._last, self._images, self._loss, self._steps, self._waited = time.monotonic(), 0, 0.0, 0, waited_s

    def count(self, images: int, loss: float) -> None:
        """One step of `images` images."""
        self._images, self._loss, self._steps = self._images + images, self._loss + loss, self._steps + 1

    def due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._last >= self._interval_s

    def write(self, stage: int, step: int, total: int, epoch: float, waited_s: float) -> None:
        """Write the interval's means and begin the next one."""
        if self._steps == 0:
            return
        seconds = time.monotonic() - self._last
        record = {
            "stage": stage,
            "step": step,
            "epoch": round(epoch, 3),
            "loss": self._loss / self._steps,
            "images_per_s": round(self._images / seconds, 1),
            "wait_share": round((waited_s - self._waited) / seconds, 4),
            "memory_gib": round(self._memory_gib(), 3),
            "elapsed_s": round(self.elapsed_s, 2),
        }
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        for key in ("loss", "images_per_s", "wait_share", "memory_gib"):
            self._tensorboard.add_scalar(f"stage{stage}/{key}", record[key], step)
        self._tensorboard.flush()
        left = (total - step) * seconds / self._steps
        say(
            f"stage {stage}  step {step}/{total}  epoch {epoch:.1f}  loss {record['loss']:.5f}  "
            f"{record['images_per_s']:.0f} images/s  wait {100 * record['wait_share']:.0f} %  "
            f"{record['memory_gib']:.2f} GiB  {left:.0f} s left"
        )
        self.restart_interval(waited_s)

    def _memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return self._process.memory_info().rss / 2**30

    def close(self) -> None:
        """Close the files."""
        self._jsonl.close()
        self._tensorboard.close()


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
