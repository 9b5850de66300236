"""`memory`: what a training step saves for backward, its peak memory and its time, for each way of training a
network.

Eager, `torch.utils.checkpoint` around each residual block, and our `recompute=` levels; with `--compile` also
under `torch.compile`. How the bytes are counted: footprint.py. Peak resident size is of a fresh process for
each; on a GPU there is none, and the peak of its allocator has the convolutions' workspaces in it.
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
LEVELS = ("none", "norm", "conv")
COMPILED = ("compile-channels-last", *(f"ours+compile {level}" for level in LEVELS))
WAYS = (*(f"ours {level}" for level in LEVELS), EAGER, EAGER_CHANNELS_LAST, CHECKPOINT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: %(default)s")
    common.add_device(parser)
    parser.add_argument("--size", type=common.positive_int, default=224, help="side of an image (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also measure under torch.compile (takes minutes)")


class Checkpointed(nn.Module):
    """A block that keeps only its input, and runs a second time in backward."""

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
            stage[index] = Checkpointed(block)
    return model


def build_step(way: str, options: argparse.Namespace) -> ModelStep:
    """The same weights and the same photographs for every way."""
    torch.manual_seed(options.seed)
    stock = stock_model(options.model).to(options.device)
    name, _, level = way.partition(" ")
    provider = PROVIDERS["eager-channels-last" if way == CHECKPOINT else name]
    if way == CHECKPOINT:
        module = checkpoint_blocks(stock).to(memory_format=torch.channels_last)
    else:
        module = build_module(provider, stock, options.backend, level or "none")
    batch = common.batch_of(options)
    x = data.photographs(batch, options.size, options.seed).to(options.device, memory_format=provider.memory_format)
    target = data.labels(batch, 1000, options.seed).to(options.device)
    return ModelStep(module, x, target, "train", common.dtype_of(options))


def build_resident_step(way: str, options: argparse.Namespace, threads: int) -> Callable[[], None]:
    """For the fresh process that peak memory is measured in."""
    torch.set_num_threads(threads)
    workload = build_step(way, options).workload()

    def run() -> None:
        state = None
        for phase in workload.values():
            state = phase(state)

    return run


def footprint_of(way: str, step: ModelStep, options: argparse.Namespace) -> dict[str, Any]:
    saved = footprint.saved_for_backward(step.forward, step.module, [step.x, step.target])
    tensor_memory = footprint.gpu_memory if options.device == "cuda" else footprint.tensor_memory
    held = tensor_memory(step.forward).held

    def whole() -> None:
        step.forward().backward()
        step.update()

    whole()  # the optimizer's state is there from the second step on
    peak = tensor_memory(whole).peak
    found = {"saved_bytes": saved.total, "hidden_bytes": saved.hidden, "held_bytes": held, "peak_tensor_bytes": peak}
    if options.device == "cpu":
        resident = footprint.peak_resident(build_resident_step, way, options, torch.get_num_threads())
        found |= {"resident_before_bytes": resident.before, "resident_peak_bytes": resident.peak}
    return found


def comparable(results: Results) -> Results:
    """Under the stock model's names, and without running statistics: stock checkpointing updates those
    twice."""
    return {name.replace(".block.", "."): tensor for name, tensor in results.items() if "running" not in name}


def check_and_build(ways: list[str], options: argparse.Namespace) -> tuple[dict[str, ModelStep], dict[str, float]]:
    steps, results, checks = {}, {}, {}
    stock_first = sorted(ways, key=lambda way: way not in (EAGER, EAGER_CHANNELS_LAST))
    for way in progress.cases(stock_first, "memory: check"):
        steps[way] = build_step(way, options)
        result = comparable(steps[way].results())
        if way in (EAGER, EAGER_CHANNELS_LAST):
            results[way] = result
            continue
        checks[way] = check_results(
            way, result, results[EAGER], [results[EAGER_CHANNELS_LAST]], factor=ERROR_FACTOR, floor=ERROR_FLOOR
        )
    return {way: steps[way] for way in ways}, checks


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.model, options.batch, options.size = "resnet18", 2, 64
    ways = [*WAYS, *(COMPILED if options.compile else ())]
    steps, checks = check_and_build(ways, options)
    footprints = {way: footprint_of(way, steps[way], options) for way in progress.cases(ways, "memory: bytes")}
    samples = measure_interleaved(
        {way: step.workload() for way, step in steps.items()},
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
        "providers": {way: {**samples[way].summary(), **footprints[way]} for way in ways},
    }
    return {"cases": [case]}


def tables(run: dict[str, Any]) -> str:
    (case,) = run["cases"]
    reference = case["providers"][EAGER_CHANNELS_LAST]
    # Each with what is subtracted from the peak; a GPU's memory has no such view.
    resident = {"peak process MB": "", "of it the step": "resident_before_bytes"}
    if "resident_peak_bytes" not in reference:
        resident = {}
    rows = [
        [
            way,
            report.megabytes(provider["saved_bytes"] / case["batch"]),
            f"{provider['saved_bytes'] / reference['saved_bytes'] - 1:+.0%}",
            report.megabytes(provider["hidden_bytes"] / case["batch"]),
            report.megabytes(provider["held_bytes"] / case["batch"]),
            report.megabytes(provider["peak_tensor_bytes"]),
            *(report.megabytes(provider["resident_peak_bytes"] - provider.get(less, 0)) for less in resident.values()),
            f"{report.milliseconds(provider['median_s'])} ±{report.spread(provider)}",
            report.ratio(provider["median_s"] / reference["median_s"]),
        ]
        for way, provider in case["providers"].items()
    ]
    header = [
        "way of training",
        "saved MB/image",
        "vs eager",
        "hidden",
        "held MB/image",
        "peak tensors MB",
        *resident,
        "step ms",
        "vs eager",
    ]
    title = f"memory: {case['name']}, {report.allocator_title(run)} (vs {EAGER_CHANNELS_LAST})"
    return title + "\n" + report.table(header, rows)


summary = tables


def plot(document: dict[str, Any], path: Path) -> None:
    plots.time_against_memory(document, path)
