"""Interleaved timing: every provider runs once in each round (A B C A B C ...), so that drift in the
machine's clock, in its neighbours or in its memory meets all of them alike. Which data is in which cache is
left as it falls: a provider finds what the previous one left, as it would find what another layer left in a
real network.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import progress

# One timed step, as named phases in order. A phase gets what the phase before it returned.
Workload = Mapping[str, Callable[[Any], Any]]

SAMPLE_SECONDS = 0.01  # a sample repeats its step until it is at least this long: far above the clock and the scheduler
WARM_UP_CALLS = 2


class Clock:
    """Reads the time on the CPU. A device whose work is queued overrides `now` to wait for it first."""

    def now(self) -> float:
        return time.perf_counter()


@dataclass
class Samples:
    """Seconds for one step, one entry a round, for each phase."""

    phases: dict[str, list[float]]

    @property
    def totals(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.phases.values(), strict=True)]

    def summary(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "median_s": statistics.median(totals),
            "p10_s": quantile(totals, 0.1),
            "p90_s": quantile(totals, 0.9),
            "rounds": len(totals),
            "phases_s": {name: statistics.median(values) for name, values in self.phases.items()},
            "samples_s": [float(f"{value:.5g}") for value in totals],
        }


def quantile(values: list[float], fraction: float) -> float:
    """Linear between the neighbours, as numpy's default."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _sample(workload: Workload, calls: int, clock: Clock) -> dict[str, float]:
    seconds = dict.fromkeys(workload, 0.0)
    before = clock.now()
    for _ in range(calls):
        state = None
        for name, phase in workload.items():
            state = phase(state)
            after = clock.now()
            seconds[name] += after - before
            before = after
    # Freeing what the last phase returned belongs to the step too (without it, unmapping large tensors would
    # be free).
    del state
    seconds[name] += clock.now() - before
    return {name: value / calls for name, value in seconds.items()}


def measure_interleaved(
    workloads: Mapping[str, Workload],
    *,
    repeat: int,
    min_time: float,
    label: str,
    clock: Clock | None = None,
) -> dict[str, Samples]:
    """Times all workloads in rounds: `repeat` rounds at least, and about `min_time` seconds for each workload
    on average."""
    clock = clock or Clock()
    calls = {}
    seconds = 0.0
    for name, workload in progress.details(workloads.items(), f"{label}: warm-up"):
        for _ in range(WARM_UP_CALLS):
            step = sum(_sample(workload, 1, clock).values())
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / max(step, 1e-7)))
        seconds += calls[name] * step
    rounds = max(repeat, math.ceil(min_time * len(workloads) / seconds))

    samples = {name: Samples({phase: [] for phase in workload}) for name, workload in workloads.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in progress.details(range(rounds), f"{label}: rounds"):
            for name, workload in workloads.items():
                for phase, value in _sample(workload, calls[name], clock).items():
                    samples[name].phases[phase].append(value)
    finally:
        gc.enable()
    return samples
