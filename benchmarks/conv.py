"""`conv`: every distinct convolution of a ResNet by itself, in inference: PyTorch's alone and with what follows it, and
ours with bias, addition and ReLU in its epilogue; where the backend has it, also with the output's statistics.

The yardstick is `aten`, the convolution alone as PyTorch runs it (cuDNN, oneDNN), which does less than the others.
`ours-packed` is a frozen network's layer, which keeps its weight in the form that the backend likes best; on a CPU its
peer is `onednn-fused`, oneDNN's own operator on a weight that is packed once. GFLOP/s are those of a direct
convolution, two operations a multiply-add, whatever the algorithm, and on a CPU stand beside the measured peak of such
instructions. Errors are relative to float64, in the Euclidean norm.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import options as common
from benchmarks import plots, progress, report
from benchmarks.check import accepts, check_results, relative_error
from benchmarks.network import Convolution, network
from benchmarks.roofline import MODELS
from benchmarks.timing import Workload, clock_of, measure_interleaved
from fused_res import backends
from fused_res.functional import conv_bias_act
from fused_res.nn.frozen import FrozenConv

HELP = "single convolutions with bias, addition and ReLU, and with statistics"

ATEN = "aten"
ONEDNN = "onednn-fused"
# The library's precision contract; Winograd alone may be off by more than that.
ERROR_FACTOR = 2.0
ERROR_FLOOR_ULP = 4
WINOGRAD_FLOOR = 3e-6


@dataclass(frozen=True)
class ConvCase:
    name: str
    count: int
    layer: Convolution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_device(parser)
    common.add_isa(parser)
    common.add_models(parser, MODELS, "resnet18 resnet50")
    parser.add_argument("--size", type=common.positive_int, default=224, help="side of an image (default: %(default)s)")
    common.add_cases(parser)


def select_cases(options: argparse.Namespace) -> list[ConvCase]:
    batch, size = (1, 32) if options.quick else (common.batch_of(options), options.size)
    cases = []
    for model in options.model or (["resnet50"] if options.quick else ["resnet18", "resnet50"]):
        same: dict[tuple[Any, ...], list[Convolution]] = {}
        for block in network(model, batch, size).blocks:
            for layer in block.convolutions:
                shape = layer.x, layer.weight, layer.spec.stride, layer.residual, layer.relu
                same.setdefault(shape, []).append(layer)
        cases += [ConvCase(f"{model} {describe(layers[0])}", len(layers), layers[0]) for layers in same.values()]
    chosen = common.chosen_cases(options, cases)
    return chosen[:4] if options.quick and not options.cases else chosen


def describe(layer: Convolution) -> str:
    kernel, stride = (sizes[0] for sizes in (layer.weight[2:], layer.spec.stride))
    what = f"{layer.name} {kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} {layer.weight[1]}>{layer.weight[0]}"
    return f"{what} {layer.x[2]}x{layer.x[3]}{' +add' if layer.residual else ''}{' +relu' if layer.relu else ''}"


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
    """An activation as a ReLU leaves it (an image in front of the stem), and weights as initialised."""
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
    return finish(output, t, layer)


def finish(output: Tensor, t: Operands, layer: Convolution) -> Tensor:
    if t.residual is not None:
        output += t.residual
    return F.relu_(output) if layer.relu else output


def build(t: Operands, layer: Convolution, backend: str) -> dict[str, Callable[[], Any]]:
    """Every provider, each a call without arguments."""
    spec = layer.spec
    how = (spec.stride, spec.padding, spec.dilation, spec.groups)
    packed = FrozenConv(t.weight, t.bias, spec, backend)
    calls: dict[str, Callable[[], Any]] = {
        ATEN: lambda: aten(t, layer),
        "aten-unfused": lambda: aten_unfused(t, layer),
        "ours": lambda: conv_bias_act(t.x, t.weight, t.bias, t.residual, *how, spec.activation, backend=backend),
        "ours-packed": lambda: packed(t.x, t.residual),
    }
    if not t.x.is_cuda and accepts(ONEDNN, onednn := onednn_fused(t, layer)):
        calls[ONEDNN] = onednn
    if t.x.is_cuda:
        if accepts("cudnn-fused", cudnn := lambda: cudnn_fused(t, layer)):
            calls["cudnn-fused"] = cudnn
        for name in ("triton", "cuda"):
            if backends.unavailable(name) is None:
                calls[f"ours-{name}"] = lambda name=name: conv_bias_act(
                    t.x, t.weight, t.bias, t.residual, *how, spec.activation, backend=name
                )
    kernels = backends.resolve(backend, t.x.device)
    if {"conv_bn_stats", "batch_norm_sync"} <= kernels.stems:  # on the CPU the statistics' own pass makes no partials

        def with_statistics() -> tuple[Tensor, Tensor]:
            z = aten(t, layer)
            return z, kernels.batch_norm_partials(z)

        calls["aten+stats"] = with_statistics
        calls["ours+stats"] = lambda: kernels.conv_bn_stats(t.x, t.weight, None, None, False, *how, True)
    return calls


def cudnn_fused(t: Operands, layer: Convolution) -> Tensor:
    """cuDNN's own epilogue, which PyTorch has operators for and does not use; without a ReLU there is none."""
    if not layer.relu:
        return aten_unfused(t, layer)
    spec = layer.spec
    how = (t.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    if t.residual is None:
        return torch.cudnn_convolution_relu(t.x, t.weight, *how)
    return torch.cudnn_convolution_add_relu(t.x, t.weight, t.residual, 1.0, *how)


def onednn_fused(t: Operands, layer: Convolution) -> Callable[[], Tensor]:
    """oneDNN's epilogue, which torch.compile with freezing uses, too."""
    spec, mkldnn = layer.spec, torch.ops.mkldnn
    how = (spec.padding, spec.stride, spec.dilation, spec.groups)
    end = "relu" if layer.relu else None

    @functools.cache
    def packed() -> Tensor:
        return mkldnn._reorder_convolution_weight(t.weight, *how, list(t.x.shape))

    if t.residual is None:
        return lambda: mkldnn._convolution_pointwise(t.x, packed(), t.bias, *how, end or "none", [], None)
    if spec.groups > 1:  # it adds only where there is one group
        return lambda: finish(mkldnn._convolution_pointwise(t.x, packed(), t.bias, *how, "none", [], None), t, layer)
    return lambda: mkldnn._convolution_pointwise.binary(
        t.x, t.residual, packed(), t.bias, *how, "add", None, end, [], None
    )


def check(
    calls: dict[str, Callable[[], Any]], t: Operands, layer: Convolution, name: str, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Each provider's error, and of those that fuse the largest in units of what is allowed."""
    exact = {"bare": aten(t.double(), layer), "whole": aten_unfused(t.double(), layer)}
    dtype = t.x.dtype
    floor = max(ERROR_FLOOR_ULP * torch.finfo(dtype).eps, WINOGRAD_FLOOR if dtype == torch.float32 else 0.0)
    errors, checks = {}, {}
    stock: dict[str, Tensor] = {}
    for provider, call in progress.details(calls.items(), f"{name}: check"):
        result = call()
        statistics = isinstance(result, tuple)
        kind = "bare" if statistics or provider == ATEN else "whole"
        values = {"output": result[0] if statistics else result}
        expected, yardstick = {"output": exact[kind]}, {"output": stock.setdefault(kind, values["output"])}
        if statistics:
            # The deviation decides, so each kind of statistics is judged against the exact one of its own output.
            for row, part in enumerate(moments(result[1])):
                values[f"moment {row + 1}"] = part
            for row, part in enumerate(exact_moments(result[0])):
                expected[f"moment {row + 1}"] = yardstick[f"moment {row + 1}"] = part
        errors[provider] = relative_error(values["output"], expected["output"])
        if provider.startswith("ours") or provider == ONEDNN:
            checks[provider] = check_results(
                f"{provider}, {name}", values, expected, [yardstick], factor=ERROR_FACTOR, floor=floor
            )
    return errors, checks


def moments(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all the parts, merged in float64."""
    count, mean, squares = partials.double().unbind(1)
    total = count.sum(0)
    whole = (count * mean).sum(0) / total
    return whole, (squares + count * (mean - whole).square()).sum(0) / total


def exact_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.double()
    return z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    clock = clock_of(options.device, cold=True)
    measured = []
    for case in progress.cases(select_cases(options), "conv"):
        t = operands(case.layer, options)
        with torch.inference_mode():
            calls = build(t, case.layer, options.backend)
            errors, checks = check(calls, t, case.layer, case.name, options)
            workloads: dict[str, Workload] = {
                name: {"forward": lambda _, call=call: call()} for name, call in calls.items()
            }
            samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
        measured.append(
            {
                "name": case.name,
                "count": case.count,
                "flops": case.layer.flops,
                "dtype": common.dtype_name(options),
                "share_of_allowed_error": checks,
                "providers": {name: {**values.summary(), "error": errors[name]} for name, values in samples.items()},
            }
        )
    return {"cases": measured}


def tables(run: dict[str, Any]) -> str:
    cases = run["cases"]
    names = report.common_providers(cases)
    rows, rates, errors = [], [], []
    others = [name for name in names if name.startswith("ours") and "+" not in name] if ONEDNN in names else []
    for case in cases:
        time = report.milliseconds(case["providers"][ATEN]["median_s"])
        relative = (report.ratio(*report.ratios([case], name, ATEN)) for name in names[1:])
        rows.append([case["name"], case["count"], time, *relative])
        speeds = (rate(run, case["flops"], case["providers"][name]["median_s"]) for name in names)
        relative = (report.ratio(*report.ratios([case], name, ONEDNN)) for name in others)
        rates.append([case["name"], *speeds, *relative])
        errors.append([case["name"], *(f"{case['providers'][name]['error']:.1e}" for name in names)])
    header = ["case", "in the net", f"{ATEN} ms", *(f"{name} / {ATEN}" for name in names[1:])]
    parts = [
        report.table(header, rows),
        rates_title(run) + "\n" + report.table(["case", *names, *(f"{name} / {ONEDNN}" for name in others)], rates),
        "error against float64\n" + report.table(["case", *names], errors),
    ]
    return "\n\n".join([*parts, summary(run)])


def rates_title(run: dict[str, Any]) -> str:
    peak = run["ceilings"].get("fma_flops_per_s")
    return "GFLOP/s of a direct convolution" + (f" (share of the {peak / 1e9:.0f} measured)" if peak else "")


def rate(run: dict[str, Any], flops: float, seconds: float) -> str:
    """GFLOP/s, and the share of the peak of multiply-adds where that was measured, which is float32's."""
    peak = run["ceilings"].get("fma_flops_per_s")
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
                rate(run, flops, seconds),
                *(report.ratio(report.geometric_mean(report.ratios(cases, name, base))) for base in bases),
                f"{max(case['providers'][name]['error'] for case in cases):.1e}",
            ]
        )
    title = (
        f"conv: sums over the nets and geometric means over {len(cases)} shapes; {rates_title(run)}; "
        f"{report.allocator_title(run)}"
    )
    header = ["provider", "whole nets ms", "GFLOP/s", *(f"time / {base}" for base in bases), "largest error"]
    return title + "\n" + report.table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "single convolutions")
