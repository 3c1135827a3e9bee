"""What is drawn of a checkpoint: made by `pictures.py`, kept by `painter.py`, shown by `monitor_pages.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MapRow:
    """Central sections of one map across z, y and x, side by side."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Pictures:
    """What a checkpoint shows."""

    checkpoint: str
    """Its folder's name."""
    stage: int
    step: int
    saved: float
    """When, epoch seconds."""
    scatter: bytes | None
    """PNG of the latents along their first two principal axes; None where a latent is one number."""
    share: tuple[float, ...]
    """Of the variance, along those axes."""
    particles: int
    shown: int
    """Particles in the scatter."""
    labels: int | None
    """True states, by which points are coloured; None: by density."""
    maps: tuple[MapRow, ...]
    side_a: float
    """Side of a section in Å."""
