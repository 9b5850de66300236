"""Learning rate schedule: linear warm-up, then cosine decay."""

from __future__ import annotations

import math


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the peak learning rate in a step: linear warm-up, then cosine decay to zero.

    Args:
        step: index of the step, from 0.
        steps: total number of steps.
        warmup: number of warm-up steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
