"""Items of the stage `conv`: the convolutions of ResNet-50. The fused kernels are forced, to see where they pay."""

from collections.abc import Iterator

import torch

from benchmarks import conv
from benchmarks.gpu import operator_options
from benchmarks.gpu.journal import Record
from benchmarks.gpu.settings import Settings
from benchmarks.timing import EventClock

OURS = tuple(f"ours-{name}{suffix}" for name in conv.GPU_BACKENDS for suffix in ("", "+stats"))
STOCK = (conv.ATEN, "aten-unfused", "cudnn-fused")


def items(settings: Settings) -> list[str]:
    return [case.name for case in conv.select_cases(operator_options.parse(conv, settings, "--model", "resnet50"))]


def run(item: str, settings: Settings) -> Iterator[Record]:
    torch.backends.cudnn.benchmark = not settings.warm
    torch.backends.cudnn.allow_tf32 = False  # only matters to a rehearsal, which is in float32
    options = operator_options.parse(conv, settings, "--model", "resnet50")
    (case,) = (case for case in conv.select_cases(options) if case.name == item)
    if settings.warm:
        operands = conv.operands(case.layer, options)
        for name, call in conv.forced(operands, case.layer).items():
            if name.startswith("ours-triton"):
                call()
        return
    providers = [name for name in OURS if name.startswith(f"ours-{settings.backend}")]
    failures: dict[str, str] = {}
    clock = EventClock(cold=True, device=settings.device)
    measured = conv.measure_case(case, options, clock, [*STOCK, *providers], failures)
    torch.cuda.empty_cache()
    yield {"kind": "conv", "case": item, **measured, "failures": failures}
