"""A stand-in for the GPU, with which the workers run on CPU tensors: for rehearsals and tests, not for measurements.

The calls of `torch.cuda` that the benchmarks make are replaced by ones with the same interface that record their names.
The Triton kernels run in Triton's interpreter, those in CUDA C++ in the simulator (tools/cuda_sim).
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

#: Names of the calls since the stand-in was entered.
calls: list[str] = []


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        calls.append("record")
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, stream: "Stream") -> None: ...

    def synchronize(self) -> None: ...


class Graph:
    """A graph whose replay does nothing: the call that is captured runs once."""

    def replay(self) -> None:
        calls.append("replay")


@contextlib.contextmanager
def _entered(name: str, *_: Any, **__: Any) -> Iterator[None]:
    calls.append(name)
    yield


def _recorded(name: str, result: Any = None) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        calls.append(name)
        return result

    return call


PROPERTIES = SimpleNamespace(
    name="Stand-in", L2_cache_size=1 << 12, multi_processor_count=132, total_memory=1 << 33, major=9, minor=0
)
REPLACED: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "graph": functools.partial(_entered, "capture"),
    "stream": functools.partial(_entered, "stream"),
    "current_stream": lambda *_: Stream(),
    "synchronize": _recorded("synchronize"),
    "_sleep": _recorded("sleep"),
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (9, 0),
    "empty_cache": _recorded("empty_cache"),
    "reset_peak_memory_stats": _recorded("reset_peak_memory_stats"),
    "max_memory_allocated": lambda *_: 0,
    "profiler": SimpleNamespace(start=_recorded("profiler start"), stop=_recorded("profiler stop")),
}


@contextlib.contextmanager
def stand_in() -> Iterator[list[str]]:
    """Return a context in which the benchmarks for a GPU run on the CPU; its value is the list of recorded calls."""
    calls.clear()
    # Inductor would compile for minutes.
    compiled = functools.partial(_compile, torch.compile)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "compile", compiled))
        for name, value in REPLACED.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield calls


def _compile(original: Any, function: Any, dynamic: bool | None = None, mode: str | None = None) -> Any:
    calls.append(f"compile {mode}")
    return original(function, dynamic=dynamic, backend="eager")
