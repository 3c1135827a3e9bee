"""Step sizes over a stage, as a pure function of the step."""

import math

RISE_STEPS = 50


def rate_factor(step: int, total: int, final: float) -> float:
    """Share of the peak step size: a short linear rise, then half a cosine down to `final`."""
    rise = min(1.0, (step + 1) / RISE_STEPS)
    return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))))
