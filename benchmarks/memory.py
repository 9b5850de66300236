"""`memory`: bytes saved for backward, peak memory and time of a training step, for each training configuration.

The configurations are eager PyTorch, `torch.utils.checkpoint` around each residual block, and fused_res with each
`recompute=` level; with `--compile` also under `torch.compile`. footprint.py describes how the bytes are counted. Peak
resident memory is that of a fresh process for each configuration. On a GPU it is not measured, and the peak of the
allocator includes the convolutions' workspaces.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import data, footprint, plots, progress, report
from benchmarks import options as common
from benchmarks.check import Results, check_results
from benchmarks.model import ERROR_FACTOR, ERROR_FLOOR
from benchmarks.providers import PROVIDERS, build_module
from benchmarks.steps import ModelStep
from benchmarks.stock import MODELS, stock_model
from benchmarks.timing import clock_of, measure_interleaved

HELP = "bytes saved for backward, peak memory and step time of each recompute level"

EAGER, EAGER_CHANNELS_LAST, CHECKPOINT = "eager", "eager-channels-last", "checkpoint"
RECOMPUTE_LEVELS = ("none", "norm", "conv")
COMPILED = ("compile-channels-last", *(f"ours+compile {level}" for level in RECOMPUTE_LEVELS))
CONFIGURATIONS = (*(f"ours {level}" for level in RECOMPUTE_LEVELS), EAGER, EAGER_CHANNELS_LAST, CHECKPOINT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: %(default)s")
    common.add_device(parser)
    parser.add_argument(
        "--size", type=common.positive_int, default=224, help="image height and width in pixels (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="also measure under torch.compile (takes minutes)")


class CheckpointedBlock(nn.Module):
    """A block that saves only its input and runs its forward again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return output


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert isinstance(stage, nn.Sequential)
        for index, block in enumerate(stage):
            stage[index] = CheckpointedBlock(block)
    return model


def build_step(configuration: str, options: argparse.Namespace) -> ModelStep:
    """Return the training step of a configuration; all configurations use the same weights and photographs."""
    torch.manual_seed(options.seed)
    stock = stock_model(options.model).to(options.device)
    name, _, level = configuration.partition(" ")
    provider = PROVIDERS["eager-channels-last" if configuration == CHECKPOINT else name]
    if configuration == CHECKPOINT:
        module = checkpoint_blocks(stock).to(memory_format=torch.channels_last)
    else:
        module = build_module(provider, stock, options.backend, level or "none")
    batch = common.batch_of(options)
    x = data.photographs(batch, options.size, options.seed).to(options.device, memory_format=provider.memory_format)
    target = data.labels(batch, 1000, options.seed).to(options.device)
    return ModelStep(module, x, target, "train", common.dtype_of(options))


def build_resident_step(configuration: str, options: argparse.Namespace, threads: int) -> Callable[[], None]:
    """Return a call that runs one step, for the fresh process in which peak resident memory is measured."""
    torch.set_num_threads(threads)
    workload = build_step(configuration, options).workload()

    def run() -> None:
        state = None
        for phase in workload.values():
            state = phase(state)

    return run


def footprint_of(configuration: str, step: ModelStep, options: argparse.Namespace) -> dict[str, Any]:
    saved = footprint.saved_for_backward(step.forward, step.module, [step.x, step.target])
    tensor_memory = footprint.gpu_memory if options.device == "cuda" else footprint.tensor_memory
    live = tensor_memory(step.forward).live

    def training_step() -> None:
        step.forward().backward()
        step.update()

    training_step()  # the optimizer's state exists from the second step on
    peak = tensor_memory(training_step).peak
    found = {"saved_bytes": saved.total, "hidden_bytes": saved.hidden, "held_bytes": live, "peak_tensor_bytes": peak}
    if options.device == "cpu":
        resident = footprint.peak_resident(build_resident_step, configuration, options, torch.get_num_threads())
        found |= {"resident_before_bytes": resident.before, "resident_peak_bytes": resident.peak}
    return found


def without_running_stats(results: Results) -> Results:
    """Return the results under the stock model's names, without running statistics.

    Stock checkpointing updates the running statistics twice.
    """
    return {name.replace(".block.", "."): tensor for name, tensor in results.items() if "running" not in name}


def check_and_build(
    configurations: list[str], options: argparse.Namespace
) -> tuple[dict[str, ModelStep], dict[str, float]]:
    steps, results, checks = {}, {}, {}
    stock_first = sorted(configurations, key=lambda configuration: configuration not in (EAGER, EAGER_CHANNELS_LAST))
    for configuration in progress.cases(stock_first, "memory: check"):
        steps[configuration] = build_step(configuration, options)
        result = without_running_stats(steps[configuration].results())
        if configuration in (EAGER, EAGER_CHANNELS_LAST):
            results[configuration] = result
            continue
        checks[configuration] = check_results(
            configuration,
            result,
            results[EAGER],
            [results[EAGER_CHANNELS_LAST]],
            factor=ERROR_FACTOR,
            floor=ERROR_FLOOR,
        )
    return {configuration: steps[configuration] for configuration in configurations}, checks


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.model, options.batch, options.size = "resnet18", 2, 64
    configurations = [*CONFIGURATIONS, *(COMPILED if options.compile else ())]
    steps, checks = check_and_build(configurations, options)
    footprints = {
        configuration: footprint_of(configuration, steps[configuration], options)
        for configuration in progress.cases(configurations, "memory: bytes")
    }
    samples = measure_interleaved(
        {configuration: step.workload() for configuration, step in steps.items()},
        **common.timing(options),
        label="memory: time",
        clock=clock_of(options.device),
    )
    batch = common.batch_of(options)
    case = {
        "name": f"{options.model} {batch}x{options.size}x{options.size}",
        "model": options.model,
        "batch": batch,
        "dtype": common.dtype_name(options),
        "size": options.size,
        "share_of_allowed_error": checks,
        "providers": {
            configuration: {**samples[configuration].summary(), **footprints[configuration]}
            for configuration in configurations
        },
    }
    return {"cases": [case]}


def tables(run: dict[str, Any]) -> str:
    (case,) = run["cases"]
    reference = case["providers"][EAGER_CHANNELS_LAST]
    # Column titles, each with the entry that is subtracted from the peak; not measured on a GPU.
    resident = {"peak RSS MB": "", "RSS increase MB": "resident_before_bytes"}
    if "resident_peak_bytes" not in reference:
        resident = {}
    rows = [
        [
            configuration,
            report.megabytes(provider["saved_bytes"] / case["batch"]),
            f"{provider['saved_bytes'] / reference['saved_bytes'] - 1:+.0%}",
            report.megabytes(provider["hidden_bytes"] / case["batch"]),
            report.megabytes(provider["held_bytes"] / case["batch"]),
            report.megabytes(provider["peak_tensor_bytes"]),
            *(
                report.megabytes(provider["resident_peak_bytes"] - provider.get(subtracted, 0))
                for subtracted in resident.values()
            ),
            f"{report.milliseconds(provider['median_s'])} ±{report.spread(provider)}",
            report.ratio(provider["median_s"] / reference["median_s"]),
        ]
        for configuration, provider in case["providers"].items()
    ]
    header = [
        "configuration",
        "saved MB/image",
        f"saved vs {EAGER_CHANNELS_LAST}",
        "outside save_for_backward MB/image",
        "live MB/image",
        "peak tensor MB",
        *resident,
        "step ms",
        f"time vs {EAGER_CHANNELS_LAST}",
    ]
    title = f"memory: {case['name']}, {report.allocator_title(run)}"
    return title + "\n" + report.table(header, rows)


summary = tables


def plot(document: dict[str, Any], path: Path) -> None:
    plots.time_against_memory(document, path)
