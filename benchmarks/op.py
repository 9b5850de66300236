"""`op`: act(bn(x) [+ residual]) at the activation shapes of ResNet-50, forward and backward.

Memory-bound work, so next to the time stand GB/s and the share of this machine's measured copy bandwidth,
counted for the fewest bytes and for the bytes that the algorithm moves (formulas: traffic.py). Tensors that
fit the last-level cache can exceed 100 %: part of them never comes from memory. On a CPU inputs are not flushed
from the caches between calls, on a GPU they are.
"""

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import options as common
from benchmarks import plots, progress, report, traffic
from benchmarks.cases import Mode, OpCase, quick_op_cases, resnet50_op_cases
from benchmarks.check import Results, accepts, check_results
from benchmarks.providers import (
    EAGER,
    EAGER_CHANNELS_LAST,
    NORMS,
    BatchNormAct,
    Provider,
    build_batch_norm_act,
    stock_batch_norm_act,
)
from benchmarks.timing import Workload, clock_of, measure_interleaved

HELP = "batch norm (+ add) + ReLU, forward and backward, at ResNet-50's activation shapes"

# The library's precision contract: at most twice stock's error against float64, and a few ulp (of the dtype)
# where stock is exact.
ERROR_FACTOR = 2.0
ERROR_FLOOR_ULP = 4
# A ReLU whose float64 input is nearer to zero than this may switch either way in the dtype that is measured.
# Such elements (in float32 some 1e-5 of all) get no gradient, so that the comparison of gradients is about
# arithmetic and not about coin tosses.
UNDECIDED = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_providers(parser, NORMS)
    common.add_device(parser)
    parser.add_argument("--size", type=common.positive_int, default=224, help="side of an image (default: %(default)s)")
    parser.add_argument("--mode", choices=["train", "eval"], default="train", help="default: %(default)s")
    common.add_cases(parser)


def select_cases(options: argparse.Namespace) -> list[OpCase]:
    cases = quick_op_cases() if options.quick else resnet50_op_cases(common.batch_of(options), options.size)
    return common.chosen_cases(options, cases)


class Inputs:
    """One case's tensors. Every provider starts from the same values, in its own memory format; activations in
    the dtype that is measured, what belongs to the channels in float32, as under autocast."""

    def __init__(self, case: OpCase, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        channels = case.shape[1]
        self.case = case
        self.dtype = dtype
        x = normal(*case.shape) * (0.5 + normal(1, channels, 1, 1).abs()) + 2 * normal(1, channels, 1, 1)
        self.x = x.to(dtype)
        self.weight = 1 + 0.2 * normal(channels)
        self.bias = 0.5 * normal(channels)
        self.running_mean = 0.1 * normal(channels)
        self.running_var = 1 + 0.2 * normal(channels).abs()
        self.residual = normal(*case.shape).to(dtype) if case.residual else None
        self.grad_output = normal(*case.shape).to(dtype)

    def silence_undecided(self, mode: Mode) -> None:
        if self.case.activation == "relu" and mode == "train":
            x, mean, var, weight, bias, residual = self.arguments(torch.contiguous_format, torch.float64, mode)
            run = stock_batch_norm_act("identity", training=True)
            with torch.no_grad():
                self.grad_output[run(x, mean, var, weight, bias, residual).abs() < UNDECIDED[self.dtype]] = 0

    def arguments(self, memory_format: torch.memory_format, dtype: torch.dtype | None, mode: Mode) -> tuple[Any, ...]:
        """Fresh copies, in the order that a BatchNormAct takes them, all in `dtype` or each in its own; leaves that
        require grad in training."""

        def leaf(tensor: Tensor | None, requires_grad: bool) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=memory_format)
            return tensor.to(dtype or tensor.dtype, copy=True).requires_grad_(requires_grad and mode == "train")

        return (
            leaf(self.x, True),
            leaf(self.running_mean, False),
            leaf(self.running_var, False),
            leaf(self.weight, True),
            leaf(self.bias, True),
            leaf(self.residual, True),
        )


def results(run: BatchNormAct, arguments: tuple[Any, ...], grad_output: Tensor, mode: Mode) -> Results:
    x, running_mean, running_var, weight, bias, residual = arguments
    if mode == "eval":
        with torch.no_grad():
            return {"output": run(*arguments)}
    output = run(*arguments)
    wanted = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    if residual is not None:
        wanted["grad_residual"] = residual
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output)
    return {
        "output": output.detach(),
        "running_mean": running_mean.clone(),
        "running_var": running_var.clone(),
        **dict(zip(wanted, grads, strict=True)),
    }


def workload(run: BatchNormAct, arguments: tuple[Any, ...], grad_output: Tensor, mode: Mode) -> Workload:
    if mode == "eval":

        def inference(_: None) -> Tensor:
            with torch.no_grad():
                return run(*arguments)

        return {"forward": inference}
    leaves = [tensor for tensor in arguments if tensor is not None and tensor.requires_grad]
    return {
        "forward": lambda _: run(*arguments),
        "backward": lambda output: torch.autograd.grad(output, leaves, grad_output),
    }


def check_and_build(
    providers: list[Provider], case: OpCase, options: argparse.Namespace
) -> tuple[dict[str, Workload], dict[str, float]]:
    """A timed step for each provider, after all of them have been found to compute the same."""
    mode: Mode = options.mode
    dtype = common.dtype_of(options)
    inputs = Inputs(case, options.seed, options.device, dtype)
    inputs.silence_undecided(mode)
    stock = stock_batch_norm_act(case.activation, mode == "train")
    reference = results(
        stock, inputs.arguments(torch.contiguous_format, torch.float64, mode), inputs.grad_output.double(), mode
    )

    def operands(provider: Provider) -> tuple[tuple[Any, ...], Tensor]:
        arguments = inputs.arguments(provider.memory_format, None, mode)
        return arguments, inputs.grad_output.contiguous(memory_format=provider.memory_format)

    # Stock in channels_last sums less carefully: its error is up to 100 times that of the other format.
    yardsticks = [results(stock, *operands(provider), mode) for provider in (EAGER, EAGER_CHANNELS_LAST)]
    workloads, checks = {}, {}
    for provider in progress.details(providers, f"{case.name}: check"):
        run = build_batch_norm_act(provider, case.activation, mode == "train", options.backend)
        arguments, grad_output = operands(provider)
        checks[provider.name] = check_results(
            f"{provider.name}, {case.name}",
            results(run, arguments, grad_output, mode),
            reference,
            yardsticks,
            factor=ERROR_FACTOR,
            floor=ERROR_FLOOR_ULP * torch.finfo(dtype).eps,
        )
        workloads[provider.name] = workload(run, arguments, grad_output, mode)
    return workloads, checks


def applicable(providers: list[Provider], options: argparse.Namespace) -> list[Provider]:
    """The providers without cuDNN's norm where cuDNN refuses it."""
    if not any(provider.cudnn for provider in providers):
        return providers
    if options.device != "cuda":
        raise SystemExit("cudnn: needs --device cuda")
    inputs = Inputs(OpCase("", (2, 8, 4, 4), False, "relu", 1), 0, options.device, common.dtype_of(options))
    arguments = inputs.arguments(torch.channels_last, None, options.mode)
    run = build_batch_norm_act(NORMS["cudnn"], "relu", options.mode == "train", options.backend)
    return [provider for provider in providers if not provider.cudnn or accepts("cudnn", lambda: run(*arguments))]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    providers = applicable(common.chosen_providers(options, NORMS), options)
    dtype = common.dtype_of(options)
    clock = clock_of(options.device, cold=True)
    measured = []
    for case in progress.cases(select_cases(options), "op"):
        torch._dynamo.reset()  # each case compiles for its own shape
        workloads, checks = check_and_build(providers, case, options)
        samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
        n = dtype.itemsize * math.prod(case.shape)
        relu = case.activation == "relu"
        fused = traffic.fused(n, case.residual, options.mode, relu, dtype.itemsize).of(options.mode)
        eager = traffic.eager(n, case.residual, options.mode, relu, options.device).of(options.mode)
        measured.append(
            {
                **asdict(case),
                "dtype": common.dtype_name(options),
                "fewest_bytes": traffic.fewest(n, case.residual).of(options.mode),
                "moved_bytes": {p.name: fused if p.fused else eager for p in providers if p.fused or not p.compiled},
                "share_of_allowed_error": checks,
                "providers": {name: values.summary() for name, values in samples.items()},
            }
        )
    return {"cases": measured}


def tables(run: dict[str, Any]) -> str:
    copy = run["ceilings"]["copy_bytes_per_s"]
    cases = run["cases"]
    names = list(cases[0]["providers"])
    rows = []
    for case in cases:
        first = case["providers"][names[0]]
        sizes = case["fewest_bytes"], case["moved_bytes"].get(names[0])
        rates = [size / first["median_s"] if size else None for size in sizes]
        shown = [[f"{rate / 1e9:.1f}", f"{rate / copy:.0%}"] if rate else ["-", "-"] for rate in rates]
        phases = [report.milliseconds(value) for value in first["phases_s"].values()]
        rows.append([case["name"], case["count"], *phases, *shown[0], *shown[1]])
    phases = [f"{phase} ms" for phase in cases[0]["providers"][names[0]]["phases_s"]]
    header = ["case", "in the net", *phases, "GB/s fewest", "of copy", "GB/s moved", "of copy"]
    title = f"{names[0]}, where copying runs at {copy / 1e9:.1f} GB/s (read plus write)"
    return "\n\n".join([report.wide_times(cases), f"{title}\n{report.table(header, rows)}", summary(run)])


def summary(run: dict[str, Any]) -> str:
    copy = run["ceilings"]["copy_bytes_per_s"]
    cases = run["cases"]
    activated = [case for case in cases if case["activation"] == "relu"]
    names = list(cases[0]["providers"])
    rows = []
    for name in names:
        medians = [case["providers"][name]["median_s"] for case in cases]
        network = sum(case["count"] * seconds for case, seconds in zip(cases, medians, strict=True))
        means = [report.geometric_mean(report.ratios(some, name, names[0])) for some in (activated, cases)]
        shares = []
        for sizes in ([case["fewest_bytes"] for case in cases], [case["moved_bytes"].get(name) for case in cases]):
            rates = [size / seconds / copy for size, seconds in zip(sizes, medians, strict=True) if size]
            shares.append(f"{report.geometric_mean(rates):.0%}" if rates else "-")
        rows.append([name, report.milliseconds(network), *map(report.ratio, means), *shares])
    ours = f"time / {names[0]}"
    header = ["provider", "whole net ms", f"{ours}, with ReLU", "all", "copy bandwidth, fewest bytes", "moved"]
    title = (
        f"op: geometric means over {len(cases)} shapes, {len(activated)} with ReLU (the others are projections'), "
        f"{report.allocator_title(run)}"
    )
    return title + "\n" + report.table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.bandwidth(document, path)
