"""`model`: end-to-end training steps (with zero_grad and optimizer) and inferences of full networks, on photographs."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, plots, progress, report
from benchmarks import options as common
from benchmarks.cases import SMALL_MODEL_CASES, ModelCase
from benchmarks.check import check_results
from benchmarks.providers import EAGER, EAGER_CHANNELS_LAST, NETWORK_PROVIDERS, Provider, build_module
from benchmarks.steps import ModelStep, calibrate_batch_norm
from benchmarks.stock import MODELS, stock_model
from benchmarks.timing import Workload, clock_of, measure_interleaved

HELP = "training step and inference of full networks"

# The reference is stock PyTorch in float32 (a float64 step of ResNet-50 takes 16 s). The tolerance is a multiple of the
# difference between its two memory formats: up to 5 % for early gradients, see check.py. Below float32 it is a multiple
# of the error of either format against float32. The floor is for small networks, where the formats agree.
ERROR_FACTOR = 3.0
ERROR_FLOOR = 1e-3

DEFAULTS: dict[str, Any] = {
    "model": ["resnet18", "resnet50"],
    "mode": ["train", "eval"],
    "batch": None,  # depends on the device
    "size": 224,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_providers(parser, NETWORK_PROVIDERS)
    common.add_device(parser)
    common.add_models(parser, MODELS, "resnet18 resnet50")
    parser.add_argument("--mode", nargs="+", choices=["train", "eval"], help="default: both")
    parser.add_argument("--size", type=common.positive_int, help="image height and width in pixels (default: 224)")
    parser.add_argument(
        "--small",
        action="store_true",
        help="only the small cases, ResNet-18 on 32x32 images (default, without any of these options: all cases)",
    )


def select_cases(options: argparse.Namespace) -> list[ModelCase]:
    given = {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}
    if options.small:
        if given:
            raise SystemExit(
                f"--small sets the model, its mode and its shape: expected none of them, got --{', --'.join(given)}"
            )
        return list(SMALL_MODEL_CASES)
    if options.quick:
        given = {"model": ["resnet18"], "batch": 2, "size": 64} | given
    chosen = DEFAULTS | given
    batch = chosen["batch"] or common.batch_of(options)
    large = [ModelCase(name, mode, batch, chosen["size"]) for name in chosen["model"] for mode in chosen["mode"]]
    return large if given else [*large, *SMALL_MODEL_CASES]


def check_and_build(
    providers: list[Provider], case: ModelCase, options: argparse.Namespace
) -> tuple[dict[str, Workload], dict[str, float]]:
    dtype = common.dtype_of(options)
    stock = stock_model(case.model).to(options.device)
    x = data.photographs(case.batch, case.size, options.seed).to(options.device)
    target = data.labels(case.batch, 1000, options.seed).to(options.device)
    calibrate_batch_norm(stock, x)

    def step(provider: Provider, dtype: torch.dtype = dtype) -> ModelStep:
        module = build_module(provider, stock, options.backend)
        images = x.to(memory_format=provider.memory_format, copy=True)
        return ModelStep(module, images, target, case.mode, dtype, provider.cuda_graph)

    # Stock PyTorch comes first: it is the reference even where it is not one of the timed providers.
    steps = {provider: step(provider) for provider in dict.fromkeys([EAGER, EAGER_CHANNELS_LAST, *providers])}
    results = {}
    checks = {}
    exact = None if dtype == torch.float32 else step(EAGER, torch.float32).results()
    for provider, candidate in progress.details(steps.items(), f"{case.name}: check"):
        with provider.settings():
            results[provider] = candidate.results()
        if provider not in (EAGER, EAGER_CHANNELS_LAST):
            checks[provider.name] = check_results(
                f"{provider.name}, {case.name}",
                results.pop(provider),
                results[EAGER] if exact is None else exact,
                [results[EAGER], results[EAGER_CHANNELS_LAST]],
                factor=ERROR_FACTOR,
                floor=ERROR_FLOOR,
            )
    workloads = {}
    for provider in providers:
        with provider.settings():  # a CUDA graph is captured here
            workloads[provider.name] = provider.workload(steps[provider].workload())
    return workloads, checks


def measure(options: argparse.Namespace) -> dict[str, Any]:
    providers = common.select_providers(options, NETWORK_PROVIDERS)
    clock = clock_of(options.device)
    cases = select_cases(options)
    common.check_cuda_graphs(providers, options)
    measured = []
    for case in progress.cases(cases, "model"):
        torch._dynamo.reset()  # each case compiles for its own shape
        workloads, checks = check_and_build(providers, case, options)
        samples = measure_interleaved(workloads, **common.timing(options), label=case.name, clock=clock)
        measured.append(
            {
                "name": case.name,
                **asdict(case),
                "dtype": common.dtype_name(options),
                "share_of_allowed_error": checks,
                "providers": {name: values.summary() for name, values in samples.items()},
            }
        )
    return {"cases": measured}


def tables(run: dict[str, Any]) -> str:
    return report.long_times(run["cases"])


def summary(run: dict[str, Any]) -> str:
    """Return one row per case: time, images/s, and the time of every other provider relative to the first provider."""
    cases = run["cases"]
    names = list(cases[0]["providers"])
    rows = []
    for case in cases:
        first = case["providers"][names[0]]
        time = f"{report.milliseconds(first['median_s'])} ±{report.spread(first)}"
        others = (report.ratio(*report.ratios([case], name, names[0])) for name in names[1:])
        rows.append([case["name"], time, f"{case['batch'] / first['median_s']:.1f}", *others])
    header = ["", f"{names[0]} ms", "images/s", *(f"{name} / {names[0]}" for name in names[1:])]
    return f"model: time relative to {names[0]}, {report.allocator_title(run)}\n" + report.table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "training step and inference of full networks")
