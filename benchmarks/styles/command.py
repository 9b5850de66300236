"""`styles`: residual networks in every spelling, fused, relative to stock PyTorch and to torchvision's spelling.

Each style that has a twin (the same architecture in torchvision's spelling) is measured in a training step and in
frozen inference: the stock network, the fused one and the fused twin. What a spelling costs beyond its kernels (guards,
dispatch) is measured on tiny networks: the CPU time of a forward over the twin's, for each of the four blocks.
"""

import argparse
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import check, data, plots, progress, report
from benchmarks import options as common
from benchmarks.cases import Mode
from benchmarks.launch_cost import CpuClock
from benchmarks.model import ERROR_FACTOR, ERROR_FLOOR
from benchmarks.providers import (
    EAGER,
    EAGER_CHANNELS_LAST,
    INFERENCE_PROVIDERS,
    PROVIDERS,
    Provider,
    build_module,
)
from benchmarks.steps import ModelStep, calibrate_batch_norm
from benchmarks.styles.cifar import resnet20
from benchmarks.styles.style import CLASSES
from benchmarks.styles.table import BY_NAME, STYLES
from benchmarks.timing import Workload, clock_of, measure_interleaved

HELP = "networks in every spelling, relative to torchvision's"

#: Floor of the tolerance of a gradient, as of ERROR_FLOOR. These networks are small: one ReLU whose input is within
#: rounding of zero and switches is one of 65,536 elements of the last block at batch 4, or 5e-3 of every gradient.
GRADIENT_FLOOR = 2e-2

OURS: dict[Mode, Provider] = {"train": PROVIDERS["ours"], "eval": INFERENCE_PROVIDERS["ours"]}
TWIN = "twin"
QUICK_STYLES = ("cifar-basic", "regnet")
#: Channels of the stem for a multiplier of 1.
WIDTH = 8
#: Blocks of a network that has a twin.
BLOCKS = 4
#: Image size of the tiny networks, whose time is host code.
TINY_IMAGE = 8


@dataclass(frozen=True)
class StyleCase:
    style: str
    twin: str
    mode: Mode
    batch: int
    size: int
    width: int  # channels of the stem

    @property
    def name(self) -> str:
        return f"{self.style} {self.mode} {self.batch}x{self.size}x{self.size}"


@dataclass(frozen=True)
class CifarCase:
    """ResNet-20 in the most copied spelling, fused in one memory format."""

    channels_last: bool
    batch: int
    size: int = 32
    mode: Mode = "train"
    width: int = 16

    @property
    def name(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"resnet20 {self.mode} {self.batch}x{self.size}x{self.size}, ours {layout}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_cases(parser)
    common.add_device(parser)
    parser.add_argument("--image", type=common.positive_int, help="image height and width in pixels (default: 64)")
    parser.add_argument(
        "--width",
        type=common.positive_int,
        help=f"multiplier of the channels, which are {WIDTH} to {4 * WIDTH} for 1 (default: 8)",
    )
    parser.add_argument(
        "--cifar",
        action="store_true",
        help="instead, train ResNet-20 in the most copied spelling on 32x32 images (default batch: 128)",
    )


def select_styles(options: argparse.Namespace) -> list[StyleCase]:
    batch = options.batch or (2 if options.quick else common.batch_of(options))
    image = options.image or (16 if options.quick else 64)
    width = WIDTH * (options.width or (1 if options.quick else 8))
    cases = [
        StyleCase(style.name, style.twin, mode, batch, image, width)
        for style in STYLES
        if style.twin is not None and not (options.quick and style.name not in QUICK_STYLES)
        for mode in OURS
    ]
    return common.filter_cases(options, cases)


def select_cifar(options: argparse.Namespace) -> list[CifarCase]:
    if options.image or options.width:
        raise SystemExit("--cifar sets the network and the image size: expected neither --image nor --width")
    batch = options.batch or (4 if options.quick else 128)
    return common.filter_cases(options, [CifarCase(channels_last, batch) for channels_last in (True, False)])


def check_and_build(
    stock: nn.Module, ours: Provider, case: StyleCase | CifarCase, x: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Workload], dict[str, float]]:
    """Return the phases of ours and of stock PyTorch, and the share of the allowed error that ours has."""
    target = data.labels(case.batch, CLASSES, options.seed).to(options.device)
    dtype = common.dtype_of(options)
    calibrate_batch_norm(stock, x)

    def step(provider: Provider, dtype: torch.dtype = dtype) -> ModelStep:
        module = build_module(provider, stock, options.backend)
        images = x.to(memory_format=provider.memory_format, copy=True)
        return ModelStep(module, images, target, case.mode, dtype)

    steps = {provider: step(provider) for provider in (ours, EAGER, EAGER_CHANNELS_LAST)}
    results = {provider: candidate.results() for provider, candidate in steps.items()}
    reference = results[EAGER] if dtype == torch.float32 else step(EAGER, torch.float32).results()

    def share(gradients: bool, floor: float) -> float:
        def chosen(tensors: check.Results) -> check.Results:
            return {name: tensor for name, tensor in tensors.items() if name.startswith("grad of ") == gradients}

        stock = [chosen(results[EAGER]), chosen(results[EAGER_CHANNELS_LAST])]
        return check.check_results(
            f"{ours.name}, {case.name}", chosen(results[ours]), chosen(reference), stock,
            factor=ERROR_FACTOR, floor=floor,
        )  # fmt: skip

    largest = max(share(False, ERROR_FLOOR), share(True, GRADIENT_FLOOR))
    return {provider.name: candidate.workload() for provider, candidate in steps.items()}, {ours.name: largest}


def measure_style(case: StyleCase, options: argparse.Namespace) -> dict[str, Any]:
    x = data.photographs(case.batch, case.size, options.seed).to(options.device)
    networks = {name: BY_NAME[name].build(case.width).to(options.device) for name in (case.style, case.twin)}
    workloads, checks = check_and_build(networks[case.style], OURS[case.mode], case, x, options)
    del workloads[EAGER.name]  # channels_last is the faster one
    workloads[TWIN] = check_and_build(networks[case.twin], OURS[case.mode], case, x, options)[0][OURS[case.mode].name]
    samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock_of(options.device))
    twin = samples.pop(TWIN).summary()
    return result(case, options, checks, {name: values.summary() for name, values in samples.items()}, twin_time=twin)


def measure_cifar(case: CifarCase, options: argparse.Namespace) -> dict[str, Any]:
    x = data.photographs(case.batch, case.size, options.seed).to(options.device)
    ours = replace(OURS[case.mode], channels_last=case.channels_last)
    workloads, checks = check_and_build(resnet20(case.width).to(options.device), ours, case, x, options)
    samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock_of(options.device))
    return result(case, options, checks, {name: values.summary() for name, values in samples.items()})


def result(
    case: StyleCase | CifarCase,
    options: argparse.Namespace,
    checks: dict[str, float],
    providers: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    return {
        "name": case.name,
        **asdict(case),
        "dtype": common.dtype_name(options),
        "share_of_allowed_error": checks,
        "providers": providers,
        **more,
    }


def overhead(case: StyleCase, options: argparse.Namespace) -> float:
    """Return the CPU time of a fused block's forward over that of its twin, on tiny tensors, in microseconds.

    It is the median of the differences within a round: a round's two samples are measured one after the other.
    """
    x = data.photographs(1, TINY_IMAGE, options.seed).to(options.device)

    def forward(name: str) -> Workload:
        network = BY_NAME[name].build(WIDTH).to(options.device).eval()
        module = build_module(PROVIDERS["ours"], network, options.backend)
        images = x.to(memory_format=torch.channels_last)

        def call(_: Any) -> Tensor:
            with torch.no_grad():
                output: Tensor = module(images)
            return output

        return {"forward": call}

    workloads = {case.style: forward(case.style), case.twin: forward(case.twin)}
    samples = measure_interleaved(
        workloads, **common.timing(options), label=f"{case.style}: overhead", clock=CpuClock()
    )
    rounds = zip(*(samples[name].totals for name in workloads), strict=True)
    return statistics.median(ours - twin for ours, twin in rounds) / BLOCKS * 1e6


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.cifar:
        return {"cases": [measure_cifar(case, options) for case in progress.cases(select_cifar(options), "styles")]}
    measured: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for case in progress.cases(select_styles(options), "styles"):
        with check.recorded(case.name, failures):
            measured.append(measure_style(case, options))
            if case.mode == "train":
                measured[-1]["overhead_us"] = overhead(case, options)
    if not measured:
        raise SystemExit("\n".join(["styles: nothing was measured", *failures.values()]))
    return {"cases": measured, "failures": failures}


def twin_ratio(case: dict[str, Any]) -> float:
    """Return the time of a fused style relative to that of its fused twin."""
    return case["providers"]["ours"]["median_s"] / case["twin_time"]["median_s"]


def is_cifar(run: dict[str, Any]) -> bool:
    return "twin_time" not in run["cases"][0]


def tables(run: dict[str, Any]) -> str:
    if is_cifar(run):
        return report.long_times(run["cases"])
    rows = []
    for case in run["cases"]:
        ours = case["providers"]["ours"]
        rows.append(
            [
                case["name"],
                report.milliseconds(ours["median_s"]),
                report.spread(ours),
                report.ratio(*report.ratios([case], "ours", EAGER_CHANNELS_LAST.name)),
                report.ratio(twin_ratio(case)),
                f"{case['overhead_us']:.1f}" if "overhead_us" in case else "",
            ]
        )
    header = ["", "ours ms", "p10-p90", f"time / {EAGER_CHANNELS_LAST.name}", "time / twin", "us/block over twin"]
    failed = [f"{name} was not measured: {reason.splitlines()[0]}" for name, reason in run["failures"].items()]
    return "\n".join([report.table(header, rows), *failed])


def summary(run: dict[str, Any]) -> str:
    """Return one row per mode: geometric means over the styles, and the style that is slowest relative to its twin."""
    if is_cifar(run):
        return report.wide_times(run["cases"])
    rows = []
    for mode in OURS:
        cases = [case for case in run["cases"] if case["mode"] == mode]
        if not cases:
            continue
        stock = report.geometric_mean(report.ratios(cases, "ours", EAGER_CHANNELS_LAST.name))
        twin = report.geometric_mean([twin_ratio(case) for case in cases])
        slowest = max(cases, key=twin_ratio)
        worst = f"{slowest['style']} {report.ratio(twin_ratio(slowest))}"
        rows.append([mode, len(cases), report.ratio(stock), report.ratio(twin), worst])
    title = f"styles: geometric means of the time of ours, {report.allocator_title(run)}"
    header = ["", "styles", f"time / {EAGER_CHANNELS_LAST.name}", "time / twin", "slowest relative to its twin"]
    return f"{title}\n{report.table(header, rows)}"


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "residual networks in every spelling")
