"""`op`: act(bn(x) [+ residual]) at the activation shapes of ResNet-50, forward and backward.

The operator is memory-bound, so the tables show GB/s and the share of this machine's measured copy bandwidth next to
the time, for the compulsory traffic and for the traffic of the algorithm (formulas: traffic.py). Tensors that fit in
the last-level cache can exceed 100 %, because part of their traffic never reaches memory. Caches are not flushed
between calls on a CPU; on a GPU the L2 cache is.
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
from benchmarks.check import Results, check_results, is_supported, recorded
from benchmarks.providers import (
    EAGER,
    EAGER_CHANNELS_LAST,
    NORM_PROVIDERS,
    BatchNormAct,
    Provider,
    build_batch_norm_act,
    stock_batch_norm_act,
)
from benchmarks.timing import Clock, Workload, clock_of, measure_interleaved

HELP = "batch norm (+ add) + ReLU, forward and backward, at ResNet-50's activation shapes"

# The accuracy criterion: at most twice the error of stock PyTorch against float64, and a few ulp of the dtype
# where stock PyTorch is exact.
ERROR_FACTOR = 2.0
ERROR_FLOOR_ULP = 4
# The sign of a ReLU's input is ambiguous in the measured dtype if its float64 value is closer to zero than this. Such
# elements (about 1e-5 of all in float32) get a zero gradient, so that the comparison of gradients tests the arithmetic
# and not the rounding of these signs.
RELU_SIGN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_providers(parser, NORM_PROVIDERS)
    common.add_device(parser)
    parser.add_argument(
        "--size", type=common.positive_int, default=224, help="image height and width in pixels (default: %(default)s)"
    )
    parser.add_argument("--mode", choices=["train", "eval"], default="train", help="default: %(default)s")
    common.add_cases(parser)


def select_cases(options: argparse.Namespace) -> list[OpCase]:
    cases = quick_op_cases() if options.quick else resnet50_op_cases(common.batch_of(options), options.size)
    return common.filter_cases(options, cases)


class Inputs:
    """Tensors of one case. All providers start from the same values, each in its own memory format.

    Activations have the measured dtype, per-channel tensors float32, as under autocast.
    """

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

    def zero_ambiguous_gradients(self, mode: Mode) -> None:
        """Zero the gradient of the output where the sign of the ReLU's input is ambiguous, in place."""
        if self.case.activation == "relu" and mode == "train":
            x, mean, var, weight, bias, residual = self.arguments(torch.contiguous_format, torch.float64, mode)
            run = stock_batch_norm_act("identity", training=True)
            with torch.no_grad():
                self.grad_output[run(x, mean, var, weight, bias, residual).abs() < RELU_SIGN_TOLERANCE[self.dtype]] = 0

    def arguments(self, memory_format: torch.memory_format, dtype: torch.dtype | None, mode: Mode) -> tuple[Any, ...]:
        """Return fresh copies in the argument order of BatchNormAct, in training as leaves that require grad.

        Args:
            memory_format: memory format of the activations.
            dtype: dtype of all copies; None: that of each tensor.
            mode: "train" or "eval".
        """

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
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias}
    if residual is not None:
        leaves["grad_residual"] = residual
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {
        "output": output.detach(),
        "running_mean": running_mean.clone(),
        "running_var": running_var.clone(),
        **dict(zip(leaves, grads, strict=True)),
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
    providers: list[Provider], case: OpCase, options: argparse.Namespace, failures: dict[str, str] | None = None
) -> tuple[dict[str, Workload], dict[str, float]]:
    """Check the results of each provider; return its workload, and its largest error as a fraction of the tolerance.

    Args:
        providers: measured providers.
        case: the case.
        options: options of the command line.
        failures: receives why a provider is left out, by name; None: such an error is raised.
    """
    mode: Mode = options.mode
    dtype = common.dtype_of(options)
    inputs = Inputs(case, options.seed, options.device, dtype)
    inputs.zero_ambiguous_gradients(mode)
    stock = stock_batch_norm_act(case.activation, mode == "train")
    reference = results(
        stock, inputs.arguments(torch.contiguous_format, torch.float64, mode), inputs.grad_output.double(), mode
    )

    def operands(provider: Provider) -> tuple[tuple[Any, ...], Tensor]:
        arguments = inputs.arguments(provider.memory_format, None, mode)
        return arguments, inputs.grad_output.contiguous(memory_format=provider.memory_format)

    # Stock PyTorch's reductions are less accurate in channels_last: up to 100 times the error of the contiguous format.
    baselines = [results(stock, *operands(provider), mode) for provider in (EAGER, EAGER_CHANNELS_LAST)]
    workloads, checks = {}, {}
    for provider in progress.details(providers, f"{case.name}: check"):
        with recorded(provider.name, failures):
            run = build_batch_norm_act(provider, case.activation, mode == "train", options.backend)
            arguments, grad_output = operands(provider)
            checks[provider.name] = check_results(
                f"{provider.name}, {case.name}",
                results(run, arguments, grad_output, mode),
                reference,
                baselines,
                factor=ERROR_FACTOR,
                floor=ERROR_FLOOR_ULP * torch.finfo(dtype).eps,
            )
            workloads[provider.name] = workload(run, arguments, grad_output, mode)
    return workloads, checks


def supported_providers(providers: list[Provider], options: argparse.Namespace) -> list[Provider]:
    """Return `providers`, without cuDNN's batch norm where cuDNN does not support it."""
    if not any(provider.cudnn for provider in providers):
        return providers
    if options.device != "cuda":
        raise SystemExit("cudnn: needs --device cuda")
    inputs = Inputs(OpCase("", (2, 8, 4, 4), False, "relu", 1), 0, options.device, common.dtype_of(options))
    arguments = inputs.arguments(torch.channels_last, None, options.mode)
    run = build_batch_norm_act(NORM_PROVIDERS["cudnn"], "relu", options.mode == "train", options.backend)
    return [provider for provider in providers if not provider.cudnn or is_supported("cudnn", lambda: run(*arguments))]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    providers = supported_providers(common.select_providers(options, NORM_PROVIDERS), options)
    clock = clock_of(options.device, cold=True)
    cases = progress.cases(select_cases(options), "op")
    return {"cases": [measure_case(case, providers, options, clock) for case in cases]}


def measure_case(
    case: OpCase,
    providers: list[Provider],
    options: argparse.Namespace,
    clock: Clock,
    failures: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Check and time one case; return it as plain data. `failures` is that of `check_and_build`."""
    torch._dynamo.reset()  # each case compiles for its own shape
    workloads, checks = check_and_build(providers, case, options, failures)
    samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
    dtype = common.dtype_of(options)
    n = dtype.itemsize * math.prod(case.shape)
    relu = case.activation == "relu"
    fused = traffic.fused(n, case.residual, options.mode, relu, dtype.itemsize).total(options.mode)
    eager = traffic.eager(n, case.residual, options.mode, relu, options.device).total(options.mode)
    return {
        **asdict(case),
        "dtype": common.dtype_name(options),
        "fewest_bytes": traffic.compulsory(n, case.residual).total(options.mode),
        "moved_bytes": {p.name: fused if p.fused else eager for p in providers if p.fused or not p.compiled},
        "share_of_allowed_error": checks,
        "providers": {name: values.summary() for name, values in samples.items()},
    }


def tables(run: dict[str, Any]) -> str:
    copy = run["ceilings"]["copy_bytes_per_s"]
    cases = run["cases"]
    names = list(cases[0]["providers"])
    rows = []
    for case in cases:
        first = case["providers"][names[0]]
        byte_counts = case["fewest_bytes"], case["moved_bytes"].get(names[0])
        rates = [size / first["median_s"] if size else None for size in byte_counts]
        cells = [[f"{rate / 1e9:.1f}", f"{rate / copy:.0%}"] if rate else ["-", "-"] for rate in rates]
        phases = [report.milliseconds(value) for value in first["phases_s"].values()]
        rows.append([case["name"], case["count"], *phases, *cells[0], *cells[1]])
    phases = [f"{phase} ms" for phase in cases[0]["providers"][names[0]]["phases_s"]]
    header = [
        "case",
        "count",
        *phases,
        "compulsory GB/s",
        "compulsory / copy bandwidth",
        "algorithm GB/s",
        "algorithm / copy bandwidth",
    ]
    title = f"{names[0]}, with a measured copy bandwidth of {copy / 1e9:.1f} GB/s (read + write)"
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
        means = [report.geometric_mean(report.ratios(subset, name, names[0])) for subset in (activated, cases)]
        shares = []
        for byte_counts in (
            [case["fewest_bytes"] for case in cases],
            [case["moved_bytes"].get(name) for case in cases],
        ):
            rates = [size / seconds / copy for size, seconds in zip(byte_counts, medians, strict=True) if size]
            shares.append(f"{report.geometric_mean(rates):.0%}" if rates else "-")
        rows.append([name, report.milliseconds(network), *map(report.ratio, means), *shares])
    ratio_title = f"time / {names[0]}"
    header = [
        "provider",
        "network ms",
        f"{ratio_title}, with ReLU",
        "all",
        "of copy bandwidth: compulsory bytes",
        "algorithm bytes",
    ]
    title = (
        f"op: geometric means over {len(cases)} shapes, {len(activated)} with ReLU (the others: projections), "
        f"{report.allocator_title(run)}"
    )
    return title + "\n" + report.table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.bandwidth(document, path)
