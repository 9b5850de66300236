"""`infer`: end-to-end inference of ResNets, latency (median and 99th percentile) and throughput (images/s).

The providers are frozen fused_res networks, stock PyTorch, torch.compile with its own freezing, and on a CPU OpenVINO
and ONNX Runtime where they are installed. Below float32 the network and the images are rounded first, except for
OpenVINO, which rounds them itself. Errors are relative to float64, in the Euclidean norm. For ResNets on a CPU two
lower bounds of the time are printed (Williams, Waterman, Patterson 2009): FLOPs of the definition at the measured peak,
which Winograd may undercut, and the bytes that a network of fused layers moves at least, at the measured copy
bandwidth, which caches may undercut.
"""

import argparse
import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data, peers, plots, progress, report
from benchmarks import options as common
from benchmarks.check import Results, check_results, relative_error
from benchmarks.levels import LEVELS, kernels
from benchmarks.network import build_network
from benchmarks.providers import (
    EAGER,
    EAGER_CHANNELS_LAST,
    INFERENCE_PEERS,
    INFERENCE_PROVIDERS,
    TRAINING_PEERS,
    Provider,
    build_module,
)
from benchmarks.roofline import MODELS as ROOFLINE_MODELS
from benchmarks.steps import calibrate_batch_norm, capture_cuda_graph
from benchmarks.stock import MODELS, stock_model
from benchmarks.timing import IDLE_SECONDS, Clock, Workload, measure_interleaved, quantile

HELP = "latency and throughput of frozen networks"

# The reference is stock PyTorch in float64 on the first CHECKED_IMAGES images, and the tolerance is a multiple of stock
# PyTorch's error in the measured dtype. The floor, in units of the dtype's machine epsilon, is for small networks,
# where stock PyTorch may happen to be exact.
ERROR_FACTOR = 4.0
ERROR_FLOOR = 8
CHECKED_IMAGES = 4

BATCHES = {"cpu": [1, 4, 16], "cuda": [1, 4, 16, 64, 256]}


class SynchronizedClock(Clock):
    """CPU time after synchronization with the GPU: the latency that a caller observes, launch overhead included."""

    warm_up_calls = 10

    def now(self) -> float:
        torch.cuda.synchronize()
        return super().now()


@dataclass(frozen=True)
class InferCase:
    model: str
    batch: int
    size: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch}x{self.size}x{self.size} {self.dtype}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    parser.set_defaults(repeat=20, min_time=3.0)  # a percentile needs many samples, so each is one call
    common.add_providers(parser, INFERENCE_PROVIDERS)
    common.add_isa(parser)
    common.add_models(parser, MODELS, "resnet18 resnet34 resnet50")
    parser.add_argument(
        "--batch", nargs="+", type=common.positive_int, help="batch sizes (default: 1 4 16, on a GPU also 64 and 256)"
    )
    parser.add_argument("--size", type=common.positive_int, help="image height and width in pixels (default: 224)")
    parser.add_argument("--device", choices=BATCHES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=common.DTYPES, help="dtype of model and images (default: float32, on a GPU bfloat16)"
    )


def select_cases(options: argparse.Namespace) -> list[InferCase]:
    names = options.model or (["resnet18"] if options.quick else ["resnet18", "resnet34", "resnet50"])
    batches = options.batch or ([1, 2] if options.quick else BATCHES[options.device])
    size = options.size or (64 if options.quick else 224)
    dtype = common.dtype_name(options)
    return [InferCase(name, batch, size, dtype, options.device) for name in names for batch in batches]


def infer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(x)


def build(provider: Provider, stock: nn.Module, x: Tensor, backend: str) -> Workload:
    images = x.to(memory_format=provider.memory_format, copy=True)
    module = build_module(provider, stock, backend)
    if provider.cuda_graph:
        return {"forward": capture_cuda_graph(lambda: infer(module, images))}
    return provider.workload({"forward": lambda _: infer(module, images)})


def build_peer(runtime: str, stock: nn.Module, x: Tensor, dtype: torch.dtype) -> Workload:
    run = peers.build(runtime, stock, x.clone(), dtype)
    return {"forward": lambda _: run()}


def check_and_build(
    providers: list[Provider], case: InferCase, options: argparse.Namespace
) -> tuple[dict[str, Workload], dict[str, float], dict[str, float]]:
    """Check the results of each provider; return the workloads, the shares of the tolerance, and all errors."""
    stock = stock_model(case.model)
    images = data.photographs(case.batch, case.size, options.seed)
    calibrate_batch_norm(stock, images)
    stock.eval()
    reference = {"output": infer(copy.deepcopy(stock).double(), images[:CHECKED_IMAGES].double())}
    dtype = common.DTYPES[case.dtype]
    rounded = copy.deepcopy(stock).to(case.device, dtype)
    x = images.to(case.device, dtype)

    workloads: dict[str, Workload] = {}
    results: dict[str, Results] = {}
    for provider in progress.details(dict.fromkeys([EAGER, EAGER_CHANNELS_LAST, *providers]), f"{case.name}: check"):
        if provider.runtime:
            workloads[provider.name] = build_peer(provider.runtime, stock, images, dtype)
        else:
            workloads[provider.name] = build(provider, rounded, x, options.backend)
        results[provider.name] = {"output": workloads[provider.name]["forward"](None)[:CHECKED_IMAGES].cpu()}
    baselines = [results[EAGER.name], results[EAGER_CHANNELS_LAST.name]]
    tolerance = {"factor": ERROR_FACTOR, "floor": ERROR_FLOOR * torch.finfo(dtype).eps}
    checks = {
        provider.name: check_results(
            f"{provider.name}, {case.name}", results[provider.name], reference, baselines, **tolerance
        )
        for provider in providers
        if provider not in (EAGER, EAGER_CHANNELS_LAST)
    }
    errors = {name: relative_error(result["output"], reference["output"]) for name, result in results.items()}
    return {provider.name: workloads[provider.name] for provider in providers}, checks, errors


def measure(options: argparse.Namespace) -> dict[str, Any]:
    providers = common.select_providers(options, INFERENCE_PROVIDERS)
    common.check_cuda_graphs(providers, options)
    clock, idle = (SynchronizedClock(), 0.0) if options.device == "cuda" else (Clock(), IDLE_SECONDS)
    measured = []
    for case in progress.cases(select_cases(options), "infer"):
        torch._dynamo.reset()  # each case compiles for its own shape
        workloads, checks, errors = check_and_build(providers, case, options)
        samples = measure_interleaved(
            workloads, **common.timing(options), label=case.name, clock=clock, sample_seconds=0.0, idle=idle
        )
        measured.append(
            {
                "name": case.name,
                **asdict(case),
                **least_work(case),
                "share_of_allowed_error": checks,
                "stock_error": max(errors[provider.name] for provider in (EAGER, EAGER_CHANNELS_LAST)),
                "providers": {
                    name: {**values.summary(), "p99_s": quantile(values.totals, 0.99), "error": errors[name]}
                    for name, values in samples.items()
                },
            }
        )
    return {"cases": measured}


def least_work(case: InferCase) -> dict[str, float]:
    """Return the FLOPs of a ResNet, and the bytes that its fused layers read and write; {} for other networks."""
    if case.model not in ROOFLINE_MODELS or case.device != "cpu":
        return {}
    network = build_network(case.model, case.batch, case.size)
    step = kernels(network, LEVELS["fewest"], "eval", common.DTYPES[case.dtype])
    return {"flops": sum(kernel.flops for kernel in step), "fewest_bytes": sum(kernel.bytes for kernel in step)}


def bounds(run: dict[str, Any], case: dict[str, Any]) -> list[str]:
    """Return the lower bounds of a case as lines of text; none for results without them."""
    peak, copy, flops = report.product_peak(run, case["dtype"]), run["ceilings"]["copy_bytes_per_s"], case.get("flops")
    if flops is None:
        return []
    first, provider = next(iter(case["providers"].items()))
    bounds = [(f"{case['fewest_bytes'] / 1e6:.0f} MB at {copy / 1e9:.1f} GB/s", case["fewest_bytes"] / copy)]
    if peak:
        bounds.insert(0, (f"{flops / 1e9:.1f} GFLOP at {peak / 1e9:.0f} GFLOP/s", flops / peak))
    share = [f"{text}: {report.milliseconds(s)} ms, {s / provider['median_s']:.0%} of {first}" for text, s in bounds]
    return ["lower bounds: " + "; ".join(share)]


def error_multiple(case: dict[str, Any], name: str) -> float:
    """Return the error of a provider against float64 as a multiple of stock PyTorch's in the same dtype."""
    return float(case["providers"][name]["error"]) / case["stock_error"] if case["stock_error"] else 1.0


def error_text(case: dict[str, Any], name: str) -> str:
    return f"{error_multiple(case, name):.2f}x" if "stock_error" in case else "-"  # older results have no errors


def latency(case: dict[str, Any], name: str) -> list[str]:
    """Return the median and the 99th percentile in ms, and images/s, as text."""
    provider = case["providers"][name]
    times = [report.milliseconds(provider[quantile]) for quantile in ("median_s", "p99_s")]
    return [*times, f"{case['batch'] / provider['median_s']:.1f}"]


def tables(run: dict[str, Any]) -> str:
    parts = []
    for case in run["cases"]:
        first = next(iter(case["providers"]))
        rows = [
            [
                name,
                *latency(case, name),
                report.milliseconds(report.minimum(case, name)),
                report.ratio(*report.ratios([case], name, first)),
                report.ratio(report.minimum(case, name) / report.minimum(case, first)),
                error_text(case, name),
                provider["rounds"],
            ]
            for name, provider in case["providers"].items()
        ]
        header = [
            "p50 ms",
            "p99 ms",
            "images/s",
            "min ms",
            f"p50 / {first}",
            f"min / {first}",
            "error / stock",
            "rounds",
        ]
        parts.append("\n".join([report.table([case["name"], *header], rows), *bounds(run, case)]))
    return "\n\n".join([*parts, summary(run)])


def peers_of(case: dict[str, Any]) -> list[str]:
    """Return the peers of a case: in training every configuration of stock PyTorch."""
    known = TRAINING_PEERS if case.get("mode") == "train" else INFERENCE_PEERS
    return [name for name in known if name in case["providers"]]


def peer_speedups(case: dict[str, Any], first: str) -> tuple[float, float]:
    """Return the time of the fastest peer relative to provider `first`: of the medians, and of the minima."""
    peers = peers_of(case)
    medians = {name: case["providers"][name]["median_s"] for name in (first, *peers)}
    minima = {name: report.minimum(case, name) for name in (first, *peers)}
    return min(medians[name] for name in peers) / medians[first], min(minima[name] for name in peers) / minima[first]


def fastest_peer(case: dict[str, Any], first: str) -> str:
    """Return both values of `peer_speedups` as text, and the name of the peer with the smallest median."""
    median, minimum = map(report.ratio, peer_speedups(case, first))
    peers = peers_of(case)
    return f"{median} ({minimum}) {min(peers, key=lambda name: case['providers'][name]['median_s'])}"


def summary(run: dict[str, Any]) -> str:
    """Return one row per case: latency, images/s, and the time of every other provider relative to the first provider.

    The last column is the fastest peer, of the providers that optimize for inference.
    """
    cases = run["cases"]
    first, *others = cases[0]["providers"]
    has_peers = first not in INFERENCE_PEERS and any(name in INFERENCE_PEERS for name in others)
    rows = [
        [
            case["name"],
            *latency(case, first),
            *(report.ratio(*report.ratios([case], name, first)) for name in others),
            *([fastest_peer(case, first)] if has_peers else []),
        ]
        for case in cases
    ]
    header = ["", f"{first} p50 ms", "p99 ms", "images/s", *(f"{name} / {first}" for name in others)]
    header += [f"fastest peer / {first} (minima)"] if has_peers else []
    return f"infer: time relative to {first}, {report.allocator_title(run)}\n" + report.table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "end-to-end inference")
