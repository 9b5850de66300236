"""The learning rate over a training."""

from __future__ import annotations

import math


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """What the peak rate is multiplied with in `step` of `steps`: a line up over `warmup` of them, then half a cosine
    down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
