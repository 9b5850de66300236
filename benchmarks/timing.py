"""Interleaved timing: every provider runs once in each round (A B C A B C ...), so that drift in the
machine's clock, in its neighbours or in its memory meets all of them alike. On a CPU, which data is in which
cache is left as it falls: a provider finds what the previous one left, as it would find what another layer
left in a real network. On a GPU a single operator would find all it needs in the L2 cache, so there that is
overwritten before every call (`cold`). Whole networks in several runtimes on a CPU are another matter: `IDLE`.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import progress

# One timed step, as named phases in order. A phase gets what the phase before it returned.
Workload = Mapping[str, Callable[[Any], Any]]

SAMPLE_SECONDS = 0.01  # far above the clock and the scheduler

# Threads wait for their next work in a loop, and so take the cores from whose turn it is. On two cores, CPU time spent
# behind one ResNet-18: 46 ms by ONNX Runtime, 10 by PyTorch's OpenMP, 1 by OpenVINO; PyTorch took 87 ms right after
# ONNX Runtime, 36 after itself. So where runtimes are compared, all threads get time to fall asleep before each sample,
# and the provider one call that is not timed, to wake its own (4 ms, nothing in a long call): that gives each about the
# time that it takes when alone.
IDLE = 0.06
LONG_CALL = 0.1


class Clock:
    """The CPU's. A device whose work is queued marks moments in that queue instead."""

    warm_up_calls = 2

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, before: Any, after: Any) -> float:
        return after - before

    def prepare(self) -> None:
        """Called before every call of a step, outside of what is timed."""


class EventClock(Clock):
    """A GPU's: events in the current stream, waited for once a whole sample is queued."""

    warm_up_calls = 10  # algorithms are chosen, kernels compiled, the clock rises

    def __init__(self, cold: bool) -> None:
        size = 2 * torch.cuda.get_device_properties().L2_cache_size if cold else 0
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def prepare(self) -> None:
        if self._flush.numel():
            self._flush.zero_()


def clock_of(device: str, cold: bool = False) -> Clock:
    return EventClock(cold) if device == "cuda" else Clock()


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
    marks = []
    for _ in range(calls):
        clock.prepare()
        state = None
        moments = [clock.now()]
        for phase in workload.values():
            state = phase(state)
            moments.append(clock.now())
        # Freeing what the last phase returned belongs to it (without it, unmapping large tensors would be free).
        state = None
        moments[-1] = clock.now()
        marks.append(moments)
    return {
        name: sum(clock.seconds(moments[at], moments[at + 1]) for moments in marks) / calls
        for at, name in enumerate(workload)
    }


def measure_interleaved(
    workloads: Mapping[str, Workload],
    *,
    repeat: int,
    min_time: float,
    label: str,
    clock: Clock | None = None,
    sample_seconds: float = SAMPLE_SECONDS,
    idle: float = 0.0,
) -> dict[str, Samples]:
    """Times all workloads in rounds: `repeat` rounds at least, and about `min_time` seconds for each workload
    on average. A sample is the mean of as many calls as take `sample_seconds`; with `idle`, see `IDLE`, behind so many
    seconds of sleep."""
    clock = clock or Clock()
    calls, steps = {}, {}
    for name, workload in progress.details(workloads.items(), f"{label}: warm-up"):
        for _ in range(clock.warm_up_calls):
            steps[name] = sum(_sample(workload, 1, clock).values())
        calls[name] = max(1, math.ceil(sample_seconds / max(steps[name], 1e-7)))
    seconds = sum(calls[name] * step for name, step in steps.items())
    rounds = max(repeat, math.ceil(min_time * len(workloads) / seconds))
    wake = min(steps.values()) < LONG_CALL  # for all alike

    samples = {name: Samples({phase: [] for phase in workload}) for name, workload in workloads.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in progress.details(range(rounds), f"{label}: rounds"):
            for name, workload in workloads.items():
                if idle:
                    time.sleep(idle)
                    if wake:
                        _sample(workload, 1, clock)
                for phase, value in _sample(workload, calls[name], clock).items():
                    samples[name].phases[phase].append(value)
    finally:
        gc.enable()
    return samples
