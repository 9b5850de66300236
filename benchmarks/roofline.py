"""`roofline`: bytes, FLOPs and roofline time of a training step and of an inference at each level of fusion.

The times are calculated, not measured, and the GPU need not be present. By the roofline model (Williams, Waterman,
Patterson 2009) a kernel takes the longer of its bytes at peak memory bandwidth and its FLOPs at the peak dense rate; a
step takes the sum over its kernels. levels.py lists what the kernels of each level read and write. Real kernels reach
neither peak, and convolutions stay further below theirs than memory-bound kernels. Reuse in the L2 cache between
kernels can make a step faster than calculated ("in L2": the share of the traffic of kernels whose bytes fit in the L2
cache).
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import options as common
from benchmarks import plots, report
from benchmarks.cases import Mode
from benchmarks.devices import DEVICES, Device
from benchmarks.levels import LEVELS, Kernel, kernels
from benchmarks.network import build_network

HELP = "bytes, FLOPs and roofline time of a step at each level of fusion (calculated)"

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MODES: tuple[Mode, ...] = ("train", "eval")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="h200", help="default: %(default)s")
    common.add_models(parser, MODELS, "resnet50")
    parser.set_defaults(model=["resnet50"])
    parser.add_argument("--batch", type=common.positive_int, default=256, help="batch size (default: %(default)s)")
    parser.add_argument(
        "--size", type=common.positive_int, default=224, help="image height and width in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="dtype of activations; parameters are float32 in training, as under autocast (default: %(default)s)",
    )
    parser.add_argument("--layers", action="store_true", help="also print a table of the stages")


def totals(step: Iterable[Kernel], device: Device, dtype: str) -> dict[str, float]:
    """Return sums over kernels: bytes, FLOPs, memory time, math time, and the longer of the two for each kernel."""
    rate = device.rate(dtype)
    total = dict.fromkeys(("bytes", "flops", "memory_s", "math_s", "floor_s", "l2_bytes"), 0.0)
    for kernel in step:
        memory, math = kernel.bytes / device.bandwidth, kernel.flops / rate
        total["bytes"] += kernel.bytes
        total["flops"] += kernel.flops
        total["memory_s"] += memory
        total["math_s"] += math
        total["floor_s"] += max(memory, math)
        total["l2_bytes"] += kernel.bytes if kernel.bytes <= device.l2 else 0
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = DEVICES[options.device], DTYPES[options.dtype]
    cases = []
    for model in options.model:
        net = build_network(model, options.batch, options.size)
        for mode in MODES:
            levels = {}
            for name, level in LEVELS.items():
                step = kernels(net, level, mode, dtype)
                stages = {
                    stage: [k for k in step if k.stage == stage] for stage in dict.fromkeys(k.stage for k in step)
                }
                levels[name] = {
                    **totals(step, device, options.dtype),
                    "kernels": len(step),
                    "stages": {
                        stage: totals(stage_kernels, device, options.dtype) for stage, stage_kernels in stages.items()
                    },
                }
            cases.append(
                {
                    "name": f"{model} {mode} {options.batch}x{options.size}x{options.size} {options.dtype}",
                    "batch": options.batch,
                    "mode": mode,
                    "levels": levels,
                }
            )
    return {"device": vars(device) | {"rate": device.rate(options.dtype)}, "cases": cases, "layers": options.layers}


def title(run: dict[str, Any]) -> str:
    device = run["device"]
    return (
        f"{device['name']}: {device['bandwidth'] / 1e12:.2f} TB/s, {device['rate'] / 1e12:.0f} TFLOP/s dense, "
        f"{device['l2'] >> 20} MB L2 (calculated)"
    )


def tables(run: dict[str, Any]) -> str:
    parts = [summary(run)]
    if run["layers"]:
        parts += [stage_table(case) for case in run["cases"]]
    parts.append("\n".join(f"{name:8} {level.title}" for name, level in LEVELS.items()))
    return "\n\n".join(parts)


def summary(run: dict[str, Any]) -> str:
    parts = [f"roofline: {title(run)}"]
    for case in run["cases"]:
        eager = case["levels"]["eager"]["floor_s"]
        rows = [
            [
                name,
                level["kernels"],
                f"{level['bytes'] / 1e9:.2f}",
                f"{level['l2_bytes'] / level['bytes']:.0%}",
                f"{level['flops'] / 1e9:.0f}",
                report.milliseconds(level["memory_s"]),
                report.milliseconds(level["math_s"]),
                report.milliseconds(level["floor_s"]),
                report.ratio(eager / level["floor_s"]),
                f"{case['batch'] / level['floor_s']:.0f}",
            ]
            for name, level in case["levels"].items()
        ]
        header = [
            "kernels",
            "GB",
            "in L2",
            "GFLOP",
            "memory ms",
            "math ms",
            "roofline ms",
            "speedup vs eager",
            "images/s",
        ]
        parts.append(report.table([case["name"], *header], rows))
    return "\n\n".join(parts)


def stage_table(case: dict[str, Any]) -> str:
    """Return the table of the traffic in GB and the roofline time in ms of each stage."""
    levels = case["levels"]
    rows = [
        [
            stage,
            *(f"{levels[name]['stages'][stage]['bytes'] / 1e9:.2f}" for name in levels),
            *(report.milliseconds(levels[name]["stages"][stage]["floor_s"]) for name in levels),
        ]
        for stage in levels["eager"]["stages"]
    ]
    return report.table([case["name"], *(f"{name} GB" for name in levels), *(f"{name} ms" for name in levels)], rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.roofline_times(document, path)
