"""Items of the stage `op`: the norms of ResNet-50, forward and backward, on both backends and in stock PyTorch."""

import argparse
from collections.abc import Iterator

import torch

from benchmarks import op
from benchmarks import options as common
from benchmarks.cases import OpCase
from benchmarks.gpu import operator_options
from benchmarks.gpu.journal import Record
from benchmarks.gpu.settings import Settings
from benchmarks.providers import NORM_PROVIDERS
from benchmarks.timing import EventClock
from fused_res import backends

STOCK = ("eager-channels-last", "cudnn")
OURS = {"triton": "ours-triton", "cuda": "ours-cuda"}


def _run_once(case: OpCase, options: argparse.Namespace) -> None:
    """Run the Triton kernels of a case, without the reference in float64, which would take the memory of the checks."""
    inputs = op.Inputs(case, options.seed, options.device, common.dtype_of(options))
    run = op.build_batch_norm_act(NORM_PROVIDERS["ours-triton"], case.activation, True, options.backend)
    arguments = inputs.arguments(torch.channels_last, None, "train")
    grad_output = inputs.grad_output.contiguous(memory_format=torch.channels_last)
    phases = op.workload(run, arguments, grad_output, "train")
    phases["backward"](phases["forward"](None))


def items(settings: Settings) -> list[str]:
    return [case.name for case in op.select_cases(operator_options.parse(op, settings))]


def run(item: str, settings: Settings) -> Iterator[Record]:
    options = operator_options.parse(op, settings)
    (case,) = (case for case in op.select_cases(options) if case.name == item)
    names = [OURS[name] for name in OURS if settings.backend in ("", name) and backends.unavailable(name) is None]
    if settings.warm:
        _run_once(case, options)
        return
    failures: dict[str, str] = {}
    names += () if settings.backend else STOCK
    providers = [NORM_PROVIDERS[name] for name in names if name != "cudnn" or not settings.rehearse]
    clock = EventClock(cold=True, device=settings.device)
    measured = op.measure_case(case, providers, options, clock, failures)
    torch.cuda.empty_cache()
    yield {"kind": "op", "case": item, **measured, "failures": failures}
