"""`conv`: every distinct convolution of a ResNet, measured alone, in inference.

The providers are PyTorch's bare convolution (`aten`), PyTorch's convolution with separate kernels for addition and ReLU
(`aten-unfused`), and fused_res with bias, addition and ReLU fused into the epilogue. Where the backend supports it, the
output's batch statistics are measured as well (`...+stats`): as a separate kernel, or accumulated in the epilogue. On a
GPU, `ours` is what the heuristics select, and `ours-triton` and `ours-cuda` are the fused kernels.

The baseline is `aten`, as PyTorch runs it (cuDNN, oneDNN); it does less work than the others. `ours-packed` runs a
layer as a frozen network does, with its weight packed once into the layout of the backend; on a CPU its peer is
`onednn-fused`, oneDNN's own operator on a weight that is packed once, and every algorithm with C++ kernels that
supports the layer is measured as well (`ours-direct_bf16`, ...), to judge the selection. GFLOP/s count the operations
of a direct convolution, two for each multiply-add, whatever the algorithm; on a CPU they are compared with the measured
peak of FMAs, or of products of bfloat16. Errors are relative to float64, in the Euclidean norm.
"""

import argparse
import functools
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import options as common
from benchmarks import plots, progress, report
from benchmarks.check import check_results, is_supported, recorded, relative_error
from benchmarks.network import Convolution, build_network
from benchmarks.roofline import MODELS
from benchmarks.timing import Clock, Workload, clock_of, measure_interleaved
from fused_res import backends
from fused_res.backends import registry
from fused_res.backends.cpu import convolution
from fused_res.dispatch import PackedWeight, Problem
from fused_res.dispatch.selection import Selection, candidates
from fused_res.functional import conv_bias_act
from fused_res.nn.packed import Block, PackedProgram, Unit

HELP = "single convolutions with bias, addition and ReLU, and with statistics"

ATEN = "aten"
ONEDNN = "onednn-fused"
GPU_BACKENDS = ("triton", "cuda")
# The accuracy criterion; only Winograd is allowed a larger error.
ERROR_FACTOR = 2.0
ERROR_FLOOR_ULP = 4
WINOGRAD_FLOOR = 3e-6
#: `ours-packed` must not take more than this multiple of the time of oneDNN's fused operator.
SLOWER = 1.03
PACKED = "ours-packed"
CANDIDATES = tuple(f"ours-{name}" for name in convolution.KERNELS)


@dataclass(frozen=True)
class ConvCase:
    name: str
    count: int  # occurrences in the network
    layer: Convolution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_device(parser)
    common.add_isa(parser)
    common.add_models(parser, MODELS, "resnet18 resnet50")
    parser.add_argument(
        "--size", type=common.positive_int, default=224, help="image height and width in pixels (default: %(default)s)"
    )
    common.add_cases(parser)


def select_cases(options: argparse.Namespace) -> list[ConvCase]:
    batch, size = (1, 32) if options.quick else (common.batch_of(options), options.size)
    cases = []
    for model in options.model or (["resnet50"] if options.quick else ["resnet18", "resnet50"]):
        same: dict[tuple[Any, ...], list[Convolution]] = {}
        for block in build_network(model, batch, size).blocks:
            for layer in block.convolutions:
                shape = layer.x, layer.weight, layer.spec.stride, layer.residual, layer.relu
                same.setdefault(shape, []).append(layer)
        cases += [ConvCase(f"{model} {describe(layers[0])}", len(layers), layers[0]) for layers in same.values()]
    chosen = common.filter_cases(options, cases)
    return chosen[:4] if options.quick and not options.cases else chosen


def describe(layer: Convolution) -> str:
    kernel, stride = (sizes[0] for sizes in (layer.weight[2:], layer.spec.stride))
    name = f"{layer.name} {kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} {layer.weight[1]}>{layer.weight[0]}"
    return f"{name} {layer.x[2]}x{layer.x[3]}{' +add' if layer.residual else ''}{' +relu' if layer.relu else ''}"


@dataclass(frozen=True)
class Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None

    def double(self) -> "Operands":
        residual = None if self.residual is None else self.residual.double()
        return Operands(self.x.double(), self.weight.double(), self.bias.double(), residual)


def operands(layer: Convolution, options: argparse.Namespace) -> Operands:
    """Return random operands: the output of a ReLU (for the stem, an image), and weights as at initialization."""
    generator = torch.Generator(options.device).manual_seed(options.seed)

    def normal(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, device=options.device).to(common.dtype_of(options))
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

    x = normal(*layer.x)
    weight = normal(*layer.weight) / math.sqrt(math.prod(layer.weight[1:]))
    bias, residual = normal(layer.weight[0]), normal(*layer.z) if layer.residual else None
    return Operands(x if layer.x[1] == 3 else x.relu_(), weight, bias, residual)


def aten(t: Operands, layer: Convolution) -> Tensor:
    spec = layer.spec
    return torch.conv2d(t.x, t.weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)


def aten_unfused(t: Operands, layer: Convolution) -> Tensor:
    spec = layer.spec
    output = torch.conv2d(t.x, t.weight, t.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    return apply_epilogue(output, t, layer)


def apply_epilogue(output: Tensor, t: Operands, layer: Convolution) -> Tensor:
    """Apply the residual addition and the ReLU of `layer` to `output` in place."""
    if t.residual is not None:
        output += t.residual
    return F.relu_(output) if layer.relu else output


def build(t: Operands, layer: Convolution, backend: str) -> dict[str, Callable[[], Any]]:
    """Return a call without arguments for each provider."""
    spec = layer.spec
    conv_args = (spec.stride, spec.padding, spec.dilation, spec.groups)
    packed = packed_call(t, layer, backend)
    calls: dict[str, Callable[[], Any]] = {
        ATEN: lambda: aten(t, layer),
        "aten-unfused": lambda: aten_unfused(t, layer),
        "ours": lambda: conv_bias_act(t.x, t.weight, t.bias, t.residual, *conv_args, spec.activation, backend=backend),
        PACKED: packed,
    }
    if not t.x.is_cuda and is_supported(ONEDNN, onednn := onednn_fused(t, layer)):
        calls[ONEDNN] = onednn
    if runs_on_cpu(t, backend):
        calls |= candidate_calls(t, layer)
    if t.x.is_cuda:
        if is_supported("cudnn-fused", cudnn := lambda: cudnn_fused(t, layer)):
            calls["cudnn-fused"] = cudnn
        calls |= forced(t, layer)
    kernels = backends.resolve(backend, t.x.device)
    # Backends without both operator families are skipped.
    if {"conv_bn_stats", "batch_norm_sync"} <= kernels.op_families:

        def with_statistics() -> tuple[Tensor, Tensor]:
            z = aten(t, layer)
            return z, kernels.batch_norm_partials(z)

        calls["aten+stats"] = with_statistics
        calls["ours+stats"] = lambda: kernels.conv_bn_stats(t.x, t.weight, None, None, False, *conv_args, True)
    return calls


def runs_on_cpu(t: Operands, backend: str) -> bool:
    return backends.resolve(backend, t.x.device).name == "cpu"


def packed_call(t: Operands, layer: Convolution, backend: str) -> Callable[[], Tensor]:
    """Return a call of the convolution with a cached packed weight, after a batch norm that changes nothing."""
    spec, (outputs, inputs, *kernel_size) = layer.spec, t.weight.shape
    conv = torch.nn.utils.skip_init(
        torch.nn.Conv2d, inputs * spec.groups, outputs, kernel_size, spec.stride, spec.padding, spec.dilation,
        spec.groups,
    )  # fmt: skip
    conv.weight, conv.bias = torch.nn.Parameter(t.weight, False), torch.nn.Parameter(t.bias, False)
    norm = torch.nn.BatchNorm2d(outputs, eps=0.0, affine=False, device=t.x.device, dtype=t.x.dtype).eval()
    block = Block((Unit(conv, norm, "relu" if layer.relu else "identity"),), "none" if t.residual is None else "tensor")
    program = PackedProgram()

    def call() -> Tensor:
        output = program.run(t.x, (block,), t.residual, backend)
        assert output is not None
        return output

    return call


def select_on_cpu(t: Operands, layer: Convolution) -> tuple[Problem, Selection]:
    """Return the problem of this layer in a frozen network on the CPU, and the selected algorithm."""
    has_residual = t.residual is not None
    return registry.select(
        "cpu", "inference", t.x, t.weight, layer.spec.geometry, registry.conv_preference(), True, has_residual
    )


def candidate_calls(t: Operands, layer: Convolution) -> dict[str, Callable[[], Tensor]]:
    """Return a call of every algorithm with C++ kernels that supports the layer, on a weight that is packed once."""
    problem, _ = select_on_cpu(t, layer)
    bias, calls = t.bias.float(), {}
    for algorithm in candidates(convolution.ALGORITHMS, problem):
        if algorithm.name in convolution.KERNELS:
            assert algorithm.pack is not None
            weight = PackedWeight(algorithm.pack(problem, t.weight), problem.weight)
            arguments = t.x, weight, bias, t.residual, problem.geometry, layer.relu
            calls[f"ours-{algorithm.name}"] = functools.partial(algorithm.implementations["inference"], *arguments)
    return calls


def forced(t: Operands, layer: Convolution) -> dict[str, Callable[[], Any]]:
    """Return calls of the fused kernels of every available GPU backend, also where the heuristics select cuDNN."""
    spec = layer.spec
    conv_args = (spec.stride, spec.padding, spec.dilation, spec.groups)

    def with_epilogue(name: str) -> Tensor:
        with backends.use(name, "fused"):
            return conv_bias_act(t.x, t.weight, t.bias, t.residual, *conv_args, spec.activation, backend=name)

    def with_statistics(name: str) -> tuple[Tensor, Tensor]:
        kernels = backends.resolve(name, t.x.device)
        return kernels.conv_bn_stats(t.x, t.weight, None, None, False, *conv_args, True)

    calls: dict[str, Callable[[], Any]] = {}
    for name in GPU_BACKENDS:
        if backends.unavailable(name) is None:
            calls[f"ours-{name}"] = functools.partial(with_epilogue, name)
            calls[f"ours-{name}+stats"] = functools.partial(with_statistics, name)
    return calls


def cudnn_fused(t: Operands, layer: Convolution) -> Tensor:
    """Run cuDNN's fused epilogue, which PyTorch exposes as operators but does not select; it requires a ReLU."""
    if not layer.relu:
        return aten_unfused(t, layer)
    spec = layer.spec
    conv_args = (t.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    if t.residual is None:
        return torch.cudnn_convolution_relu(t.x, t.weight, *conv_args)
    return torch.cudnn_convolution_add_relu(t.x, t.weight, t.residual, 1.0, *conv_args)


def onednn_fused(t: Operands, layer: Convolution) -> Callable[[], Tensor]:
    """Return a call of oneDNN's fused epilogue, which torch.compile with freezing also uses."""
    spec, mkldnn = layer.spec, torch.ops.mkldnn
    conv_args = (spec.padding, spec.stride, spec.dilation, spec.groups)
    activation = "relu" if layer.relu else None

    @functools.cache
    def packed() -> Tensor:
        return mkldnn._reorder_convolution_weight(t.weight, *conv_args, list(t.x.shape))

    if t.residual is None:
        return lambda: mkldnn._convolution_pointwise(t.x, packed(), t.bias, *conv_args, activation or "none", [], None)
    if spec.groups > 1:  # the binary post-op supports only one group
        return lambda: apply_epilogue(
            mkldnn._convolution_pointwise(t.x, packed(), t.bias, *conv_args, "none", [], None), t, layer
        )
    return lambda: mkldnn._convolution_pointwise.binary(
        t.x, t.residual, packed(), t.bias, *conv_args, "add", None, activation, [], None
    )


def check(
    calls: dict[str, Callable[[], Any]],
    t: Operands,
    layer: Convolution,
    name: str,
    options: argparse.Namespace,
    failures: dict[str, str] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the error of each provider and, for the fused ones, the largest error as a fraction of its tolerance.

    Args:
        calls: call of each provider.
        t: operands.
        layer: the convolution.
        name: name of the case.
        options: options of the command line.
        failures: receives why a provider is left out, by name; None: such an error is raised.
    """
    with torch.backends.cudnn.flags(benchmark=False):  # many slow algorithms for float64
        exact = {"conv": aten(t.double(), layer), "conv + epilogue": aten_unfused(t.double(), layer)}
    dtype = t.x.dtype
    floor = max(ERROR_FLOOR_ULP * torch.finfo(dtype).eps, WINOGRAD_FLOOR if dtype == torch.float32 else 0.0)
    errors, checks = {}, {}
    stock: dict[str, Tensor] = {}
    for provider, call in progress.details(calls.items(), f"{name}: check"):
        with recorded(provider, failures):
            result = call()
            statistics = isinstance(result, tuple)
            kind = "conv" if statistics or provider == ATEN else "conv + epilogue"
            values = {"output": result[0] if statistics else result}
            expected, baseline = {"output": exact[kind]}, {"output": stock.setdefault(kind, values["output"])}
            if statistics:
                # Statistics are compared with the float64 statistics of the provider's own output, so that the error of
                # the output itself is not counted twice.
                for index, part in enumerate(merge_moments(result[1])):
                    values[f"moment {index + 1}"] = part
                for index, part in enumerate(reference_moments(result[0])):
                    expected[f"moment {index + 1}"] = baseline[f"moment {index + 1}"] = part
            errors[provider] = relative_error(values["output"], expected["output"])
            if provider.startswith("ours") or provider == ONEDNN:
                checks[provider] = check_results(
                    f"{provider}, {name}", values, expected, [baseline], factor=ERROR_FACTOR, floor=floor
                )
    return errors, checks


def merge_moments(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over all parts, merged in float64 (Chan, Golub, LeVeque 1979).

    Args:
        partials: partial statistics (count, mean, M2) of each part, shape (parts, 3, channels).
    """
    count, mean, m2 = partials.double().unbind(1)
    total = count.sum(0)
    merged_mean = (count * mean).sum(0) / total
    return merged_mean, (m2 + count * (mean - merged_mean).square()).sum(0) / total


def reference_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of `z` by channel, computed in float64."""
    z = z.double()
    return z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clock = clock_of(options.device, cold=True)
    cases = progress.cases(select_cases(options), "conv")
    return {"cases": [measure_case(case, options, clock) for case in cases]}


def measure_case(
    case: ConvCase,
    options: argparse.Namespace,
    clock: Clock,
    providers: Container[str] | None = None,
    failures: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Check and time one case; return it as plain data.

    Args:
        case: the case.
        options: options of the command line.
        clock: clock of the device.
        providers: names of the providers; default: all.
        failures: receives why a provider is left out, by name; None: such an error is raised.
    """
    t = operands(case.layer, options)
    with torch.inference_mode():
        calls = build(t, case.layer, options.backend)
        if providers is not None:
            calls |= forced(t, case.layer)
            calls = {name: call for name, call in calls.items() if name in providers}
        errors, checks = check(calls, t, case.layer, case.name, options, failures)
        workloads: dict[str, Workload] = {
            name: {"forward": lambda _, call=calls[name]: call()} for name in errors if name not in (failures or ())
        }
        samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
    return {
        "name": case.name,
        "count": case.count,
        "flops": case.layer.flops,
        "dtype": common.dtype_name(options),
        "selected": select_on_cpu(t, case.layer)[1].name if runs_on_cpu(t, options.backend) else None,
        "share_of_allowed_error": checks,
        "providers": {name: {**values.summary(), "error": errors[name]} for name, values in samples.items()},
    }


def tables(run: dict[str, Any]) -> str:
    cases = run["cases"]
    names = [name for name in report.common_providers(cases) if name not in CANDIDATES]
    rows, rates, errors = [], [], []
    others = [name for name in ("ours", PACKED) if name in names] if ONEDNN in names else []
    for case in cases:
        time = report.milliseconds(case["providers"][ATEN]["median_s"])
        relative = (report.ratio(*report.ratios([case], name, ATEN)) for name in names[1:])
        rows.append([case["name"], case["count"], time, *relative])
        gflops = (gflops_text(run, case["flops"], case["providers"][name]["median_s"]) for name in names)
        relative = (report.ratio(*report.ratios([case], name, ONEDNN)) for name in others)
        rates.append([case["name"], *gflops, *relative])
        errors.append([case["name"], *(f"{case['providers'][name]['error']:.1e}" for name in names)])
    header = ["case", "count", f"{ATEN} ms", *(f"{name} / {ATEN}" for name in names[1:])]
    texts = [
        report.table(header, rows),
        *([selection_table(cases)] if any(case.get("selected") for case in cases) else []),
        gflops_title(run) + "\n" + report.table(["case", *names, *(f"{name} / {ONEDNN}" for name in others)], rates),
        "relative error vs float64\n" + report.table(["case", *names], errors),
    ]
    return "\n\n".join([*texts, summary(run)])


def gflops_title(run: dict[str, Any]) -> str:
    peak = report.product_peak(run, run["cases"][0]["dtype"])
    return "GFLOP/s of a direct convolution" + (f" (share of the measured peak, {peak / 1e9:.0f})" if peak else "")


def gflops_text(run: dict[str, Any], flops: float, seconds: float) -> str:
    """Return GFLOP/s as text, with the share of the peak where that was measured."""
    peak = report.product_peak(run, run["cases"][0]["dtype"])
    share = f" ({flops / seconds / peak:.0%})" if peak else ""
    return f"{flops / seconds / 1e9:.0f}{share}"


def summary(run: dict[str, Any]) -> str:
    cases = run["cases"]
    names = report.common_providers(cases)
    flops = sum(case["count"] * case["flops"] for case in cases)
    bases = [base for base in (ATEN, ONEDNN) if base in names]
    rows = []
    for name in names:
        seconds = sum(case["count"] * case["providers"][name]["median_s"] for case in cases)
        rows.append(
            [
                name,
                report.milliseconds(seconds),
                gflops_text(run, flops, seconds),
                *(report.ratio(report.geometric_mean(report.ratios(cases, name, base))) for base in bases),
                f"{max(case['providers'][name]['error'] for case in cases):.1e}",
            ]
        )
    title = (
        f"conv: totals over the networks, geometric means over {len(cases)} shapes; {gflops_title(run)}; "
        f"{report.allocator_title(run)}"
    )
    header = ["provider", "networks ms", "GFLOP/s", *(f"time / {base}" for base in bases), "max error"]
    slower = slower_than_onednn(cases) if ONEDNN in names else ""
    return title + "\n" + report.table(header, rows) + slower


def selection_table(cases: list[dict[str, Any]]) -> str:
    """Return a table of the selected algorithm of each layer, and of every candidate relative to oneDNN's operator.

    The peer is oneDNN's fused operator; where it does not support the layer, the time is in ms.
    """
    names = list(dict.fromkeys(name for case in cases for name in case["providers"] if name in CANDIDATES))
    rows = []
    for case in cases:
        has_peer = ONEDNN in case["providers"]
        row = [case["name"], case["selected"]]
        for name in (PACKED, *names):
            if name not in case["providers"]:
                row.append("-")
            elif has_peer:
                row.append(pair(onednn_ratios(case, name)))
            else:
                row.append(f"{report.milliseconds(case['providers'][name]['median_s'])} ms")
        slower = has_peer and max(onednn_ratios(case)) > SLOWER
        rows.append([*row, "slower" if slower else "", f"{error_multiple(case, PACKED):.2f}x"])
    header = ["case", "selected", PACKED, *names, f"over {SLOWER - 1:.0%}", f"error {PACKED} / aten-unfused"]
    return f"time / {ONEDNN}, medians (minima)\n" + report.table(header, rows)


def pair(ratios: tuple[float, float]) -> str:
    return f"{report.ratio(ratios[0])} ({report.ratio(ratios[1])})"


def onednn_ratios(case: dict[str, Any], name: str = PACKED) -> tuple[float, float]:
    """Return the time of a provider relative to oneDNN's fused operator: of the medians, and of the minima."""
    (median,) = report.ratios([case], name, ONEDNN)
    return median, report.minimum(case, name) / report.minimum(case, ONEDNN)


def error_multiple(case: dict[str, Any], name: str) -> float:
    """Return the error against float64 as a multiple of that of stock's convolution, addition and ReLU."""
    stock: float = case["providers"]["aten-unfused"]["error"]
    return float(case["providers"][name]["error"]) / stock if stock else 1.0


def slower_than_onednn(cases: list[dict[str, Any]]) -> str:
    """Return a line on the layers that run slower than oneDNN's fused operator by more than 3 %."""
    texts = []
    for statistic, index in (("medians", 0), ("minima", 1)):
        ratios = {case["name"]: onednn_ratios(case)[index] for case in cases}
        worst = max(ratios, key=lambda name: ratios[name])
        count = sum(ratio > SLOWER for ratio in ratios.values())
        texts.append(f"{count} of {len(cases)} layers in {statistic} (worst: {report.ratio(ratios[worst])}, {worst})")
    return f"\n{PACKED} slower than {ONEDNN} by more than {SLOWER - 1:.0%}: " + "; ".join(texts)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "single convolutions")
