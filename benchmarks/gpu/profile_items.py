"""Items of the stages that run under a profiler: some kernels at the size of ResNet-50's first stage.

The profiler, `ncu`, starts the worker and records the launches of the marked range.
"""

from collections.abc import Iterator

import torch

from benchmarks.gpu.journal import Record
from benchmarks.gpu.kernel_calls import CALLS, Operands
from benchmarks.gpu.settings import Settings
from fused_res import backends

BATCH = 64  # enough to fill the GPU many times over; the profiler repeats each launch about ten times

KERNELS = (
    "norm forward",
    "norm backward",
    "max pool backward",
    "weight gradient",
    "conv 1x1",
    "conv 3x3 with statistics",
)


def items(settings: Settings) -> list[str]:
    return list(KERNELS)


def run(item: str, settings: Settings) -> Iterator[Record]:
    kernels = backends.resolve(settings.backend, torch.device(settings.device))
    call = CALLS[item](Operands(settings, BATCH))
    call.on(kernels)  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call.on(kernels)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    yield {"profiled": call.operator}
