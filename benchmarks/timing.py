"""Interleaved timing: every provider runs once in each round (A B C A B C ...).

Drift of the clock, noisy neighbors and the state of the memory therefore affect all providers alike. On a CPU caches
are not flushed: a provider finds what the previous one left, as a layer of a network finds what the previous layer
left. On a GPU a single operator would find all operands in the L2 cache, so it is flushed before every call (`cold`),
and it would be timed at the speed of Python, so the GPU sleeps until the whole call is queued. Networks are timed as
they run, in eager mode often at the speed of Python.
Full networks in several runtimes on a CPU additionally need idle time between samples: see `IDLE_SECONDS`.
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

# One timed step as named phases in order. Each phase is called with the previous phase's return value.
Workload = Mapping[str, Callable[[Any], Any]]

# Of the counter that `torch.cuda._sleep` waits for: the highest clock of an H200. A slower clock sleeps longer.
CYCLES_PER_SECOND = 1.98e9
# A call that synchronizes, or that is still compiled after its warm-up, must not stop the benchmark.
LONGEST_SLEEP_SECONDS = 0.02

# The preparation of a call takes longer than a single operator, and events are precise: a few calls make a sample.
COLD_SAMPLE_SECONDS = 0.001

# Worker threads spin while they wait for work, and so occupy the cores of the provider that runs next. CPU time spent
# spinning after one ResNet-18 inference on two cores: 46 ms by ONNX Runtime, 10 by PyTorch's OpenMP, 1 by OpenVINO.
# PyTorch took 87 ms right after ONNX Runtime, 36 after itself. Where runtimes are compared, all threads therefore get
# time to fall asleep before each sample, and the provider makes one untimed call to wake its own threads (4 ms,
# negligible in a long call). Each provider then takes about the time that it takes alone.
IDLE_SECONDS = 0.06
LONG_CALL_SECONDS = 0.1


class Clock:
    """CPU clock. For a device with a work queue, a subclass records events in that queue."""

    warm_up_calls = 2
    sample_seconds = 0.01  # far above the resolution of the clock and the jitter of the scheduler

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, before: Any, after: Any) -> float:
        return after - before

    def prepare(self, lead: float) -> None:
        """Prepare one call of a step; runs before every call and is not timed.

        Args:
            lead: seconds that the host takes to queue the call.
        """

    def preparation(self, lead: float) -> float:
        """Return the seconds that `prepare` takes."""
        return 0.0


class EventClock(Clock):
    """GPU clock: events in the current stream, synchronized once a whole sample is queued.

    Args:
        cold: whether to flush the L2 cache before every call and to queue the whole call before it starts.
        device: device of the buffer that flushes the cache.
    """

    warm_up_calls = 10  # algorithms are selected, kernels compiled, the GPU's clock ramps up

    def __init__(self, cold: bool, device: str = "cuda") -> None:
        size = 2 * torch.cuda.get_device_properties().L2_cache_size if cold else 0
        if cold:
            self.sample_seconds = COLD_SAMPLE_SECONDS
        self._flush = torch.ones(size // 4, device=device)

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def prepare(self, lead: float) -> None:
        if not self._flush.numel():
            return
        self._flush.sum()  # a read: the lines of a write would be written back during the timed call
        torch.cuda._sleep(int(self.preparation(lead) * CYCLES_PER_SECOND))

    def preparation(self, lead: float) -> float:
        return min(2 * lead, LONGEST_SLEEP_SECONDS) if self._flush.numel() else 0.0


def clock_of(device: str, cold: bool = False) -> Clock:
    """Return the clock of a device; `cold` flushes the L2 cache of a GPU before every call."""
    return EventClock(cold) if device == "cuda" else Clock()


@dataclass
class Samples:
    """Seconds per step of each phase, one entry per round."""

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
    """Return a quantile, interpolated linearly between neighbors as numpy does by default."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _sample(workload: Workload, calls: int, clock: Clock, lead: float = 0.0) -> tuple[dict[str, float], float]:
    """Return the seconds of each phase, and the seconds that the host took to queue the last call."""
    marks = []
    host = 0.0
    for _ in range(calls):
        clock.prepare(lead)
        started = time.perf_counter()
        state = None
        timestamps = [clock.now()]
        for phase in workload.values():
            state = phase(state)
            timestamps.append(clock.now())
        # The last phase includes freeing its return value; otherwise unmapping large tensors would not be timed.
        state = None
        timestamps[-1] = clock.now()
        host = time.perf_counter() - started
        marks.append(timestamps)
    phases = {
        name: sum(clock.seconds(timestamps[at], timestamps[at + 1]) for timestamps in marks) / calls
        for at, name in enumerate(workload)
    }
    return phases, host


def measure_interleaved(
    workloads: Mapping[str, Workload],
    *,
    repeat: int,
    min_time: float,
    label: str,
    clock: Clock | None = None,
    sample_seconds: float | None = None,
    idle: float = 0.0,
) -> dict[str, Samples]:
    """Time all workloads in interleaved rounds.

    Args:
        workloads: phases of each provider's step.
        repeat: minimum number of rounds.
        min_time: seconds to measure for each workload, on average; sets the number of rounds above `repeat`.
        label: label of the progress bars.
        clock: clock of the device; default: the CPU clock.
        sample_seconds: minimum duration of a sample, which is the mean of as many calls as that takes; default: the
            clock's.
        idle: seconds of sleep before each sample, see `IDLE_SECONDS`; default: none.

    Returns:
        The samples of each provider.
    """
    clock = clock or Clock()
    sample_seconds = clock.sample_seconds if sample_seconds is None else sample_seconds
    calls, steps, leads = {}, {}, dict.fromkeys(workloads, 0.0)
    for name, workload in progress.details(workloads.items(), f"{label}: warm-up"):
        for _ in range(clock.warm_up_calls):
            phases, leads[name] = _sample(workload, 1, clock, leads[name])
            steps[name] = sum(phases.values())
        calls[name] = max(1, math.ceil(sample_seconds / max(steps[name], 1e-7)))
    seconds = sum(calls[name] * (step + clock.preparation(leads[name])) for name, step in steps.items())
    rounds = max(repeat, math.ceil(min_time * len(workloads) / seconds))
    wake = min(steps.values()) < LONG_CALL_SECONDS  # the same for all providers

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
                phases, _ = _sample(workload, calls[name], clock, leads[name])
                for phase, value in phases.items():
                    samples[name].phases[phase].append(value)
    finally:
        gc.enable()
    return samples
