"""`block`: forward and backward of single residual blocks of ResNet-18 and ResNet-50, with the weights of the model."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import options as common
from benchmarks import plots, progress, report
from benchmarks.cases import BLOCK_CASES, QUICK_BLOCK_CASES, BlockCase, Mode, input_shapes
from benchmarks.check import check_results
from benchmarks.providers import EAGER, EAGER_CHANNELS_LAST, Provider, build_module
from benchmarks.steps import BlockStep, calibrate_batch_norm
from benchmarks.stock import stock_model
from benchmarks.timing import Workload, clock_of, measure_interleaved

HELP = "residual blocks: basic and bottleneck, identity and projection"

# Gradients pass through up to four ReLUs, whose sign at inputs close to zero depends on rounding. A handful of elements
# in a million switch, so two correct results differ by more than their arithmetic error, and by an amount that varies
# from run to run.
ERROR_FACTOR = 3.0
ERROR_FLOOR = 1e-4
ERROR_FLOOR_ULP = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_providers(parser)
    common.add_device(parser)
    parser.add_argument(
        "--size",
        type=common.positive_int,
        default=224,
        help="height and width of the model's images in pixels (default: %(default)s)",
    )
    parser.add_argument("--mode", choices=["train", "eval"], default="train", help="default: %(default)s")
    common.add_cases(parser)


def select_cases(options: argparse.Namespace) -> list[BlockCase]:
    return common.filter_cases(options, QUICK_BLOCK_CASES if options.quick else BLOCK_CASES)


def check_and_build(
    providers: list[Provider], stock: nn.Module, shape: torch.Size, name: str, options: argparse.Namespace
) -> tuple[dict[str, Workload], dict[str, float]]:
    mode: Mode = options.mode
    dtype = common.dtype_of(options)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    x = torch.randn(shape, generator=generator, device=options.device)
    calibrate_batch_norm(stock.to(options.device), x)
    with torch.no_grad():
        grad_output = torch.randn(stock(x).shape, generator=generator, device=options.device).to(dtype)
    x = x.to(dtype)

    def step(provider: Provider, exact: bool = False) -> BlockStep:
        module = build_module(provider, stock, options.backend)
        x_, grad_ = (
            t.to(torch.float64 if exact else dtype, memory_format=provider.memory_format, copy=True)
            for t in (x, grad_output)
        )
        return BlockStep(module.double() if exact else module, x_, grad_, mode)

    reference = step(EAGER, exact=True).results()
    baselines = [step(provider).results() for provider in (EAGER, EAGER_CHANNELS_LAST)]
    workloads, checks = {}, {}
    for provider in progress.details(providers, f"{name}: check"):
        candidate = step(provider)
        checks[provider.name] = check_results(
            f"{provider.name}, {name}",
            candidate.results(),
            reference,
            baselines,
            factor=ERROR_FACTOR,
            floor=max(ERROR_FLOOR, ERROR_FLOOR_ULP * torch.finfo(dtype).eps),
        )
        workloads[provider.name] = candidate.workload()
    return workloads, checks


def measure(options: argparse.Namespace) -> dict[str, Any]:
    providers = common.select_providers(options)
    batch, size = (2, 64) if options.quick else (common.batch_of(options), options.size)
    clock = clock_of(options.device)
    cases = select_cases(options)
    measured = []
    models = {name: stock_model(name) for name in dict.fromkeys(case.model for case in cases)}
    for case in progress.cases(cases, "block"):
        torch._dynamo.reset()  # each block compiles for its own shape
        model = models[case.model]
        shape = input_shapes(model, [case.block], batch, size)[case.block]
        workloads, checks = check_and_build(providers, model.get_submodule(case.block), shape, case.name, options)
        samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
        measured.append(
            {
                "name": case.name,
                "input_shape": list(shape),
                "share_of_allowed_error": checks,
                "providers": {name: values.summary() for name, values in samples.items()},
            }
        )
    return {"cases": measured}


def tables(run: dict[str, Any]) -> str:
    return report.long_times(run["cases"]) + "\n\n" + summary(run)


def summary(run: dict[str, Any]) -> str:
    cases = run["cases"]
    names = list(cases[0]["providers"])
    rows = [
        [
            name,
            report.milliseconds(sum(case["providers"][name]["median_s"] for case in cases)),
            report.ratio(report.geometric_mean(report.ratios(cases, name, names[0]))),
        ]
        for name in names
    ]
    title = f"block: sums and geometric means over {len(cases)} blocks, {report.allocator_title(run)}"
    return title + "\n" + report.table(["provider", "sum ms", f"time / {names[0]}"], rows)


def plot(document: dict[str, Any], path: Path) -> None:
    mode = "forward and backward" if document["options"]["mode"] == "train" else "inference"
    plots.speedups(document, path, f"residual blocks, {mode}")
