"""What is wrong with a run, in plain words: told by `status`, by the monitor page and to Prometheus."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["stuck", "dead", "straggler", "loss", "requeues", "failed", "clock"]


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong."""

    kind: Kind
    """stuck: a rank gives no sign or does not move; dead: no rank gives a sign; straggler: a rank is slower than the others;
    loss: not finite, or rising; requeues: few are left; failed: ended by an error; clock: a machine's time differs."""
    text: str
    """One line that names the rank, its host and how long, where it is about one."""
    rank: int | None = None
