"""`launch-cost`: CPU time of the host code of a bottleneck's training step on a GPU, ours and stock PyTorch's.

No GPU is needed, and no kernel runs. Tensors are small and on the CPU. Counted: modules, dispatch, autograd and
allocation; for ours (backend `triton`) also everything that leads to a launch, down to the driver library's launch
function, which is replaced by one that does nothing (tools/stub_driver). Not counted: kernels, the driver, and the host
code inside ATen's operators, for both: convolutions, norms, additions and ReLUs only allocate their results
(noop_kernels.cpp). What cuDNN and ATen do to select and launch a kernel counts for neither, so ours is compared with a
lower bound of stock's time. Times are CPU times of the process, because other processes may run.
"""

import argparse
import contextlib
import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import allocator, plots, progress, report
from benchmarks import options as common
from benchmarks.stock import stock_model
from benchmarks.timing import Clock, Workload, measure_interleaved
from fused_res import functional, fuse
from fused_res.backends import registry

HELP = "CPU time that leads to the launches of a bottleneck's training step, without a GPU"

OURS, STOCK = "ours", "eager-channels-last"
#: Name of a bottleneck of ResNet-50, and channels of its input.
BLOCKS = {"identity": ("layer1.1", 256), "projection": ("layer1.0", 64)}
PREFERENCES = {"aten": "cuDNN's convolutions", "fused": "fused convolutions"}
PRECISIONS = {"amp": "bf16 autocast", "bf16": "bf16 parameters"}
#: A batch so small that allocation takes as long as on a GPU, whose allocator does not clear or map memory.
BATCH, SIZE = 2, 8


class CpuClock(Clock):
    """CPU time of this process."""

    warm_up_calls = 10

    def now(self) -> float:
        return time.process_time()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_cases(parser)
    parser.set_defaults(device="cpu", allocator=allocator.DEFAULT, threads=1, repeat=50)


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Run the Triton backend on CPU tensors, without executing kernels, and replace ATen's kernels by empty ones."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("launch-cost: unset TRITON_INTERPRET, the interpreter has no launches to measure")
    try:
        from torch.utils.cpp_extension import load

        from tools.stub_driver.driver import use_stand_in_driver
    except ImportError as error:
        raise SystemExit(f"launch-cost: {error}") from error
    source = str(Path(__file__).with_name("noop_kernels.cpp"))
    load("fused_res_noop_kernels", [source], extra_cflags=["-O2"], is_python_module=False, with_cuda=False)
    with use_stand_in_driver():
        resolved = {("auto", "cpu"): registry._load("triton"), ("triton", "cpu"): registry._load("triton")}
        with mock.patch.dict(registry._resolve_cache, resolved):
            yield


def build_step(block: nn.Module, channels: int, provider: str, precision: str) -> Workload:
    """Return the phases of a training step of a copy of `block`."""
    module: Any = copy.deepcopy(block).train().to(memory_format=torch.channels_last)
    module = module if precision == "amp" else module.bfloat16()
    if provider == OURS:
        module = fuse(module)
    x = torch.randn(BATCH, channels, SIZE, SIZE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    grad = torch.empty_like(module(x.float() if precision == "amp" else x), dtype=torch.bfloat16)

    if provider == OURS:
        ran = functional.last_plan[next(module.parameters())].config.backend
        assert ran == "triton", ran

    def forward(_: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
            output: Tensor = module(x)
        return output

    def backward(output: Tensor) -> None:
        output.backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return {"forward": forward, "backward": backward}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.repeat, options.min_time = 2, 0.0
    model = stock_model("resnet50")
    names = [(p, b, d) for p in PREFERENCES for b in BLOCKS for d in PRECISIONS]
    chosen = [name for name in names if not options.cases or options.cases in ", ".join(name)]
    if not chosen:
        raise SystemExit(f"--cases {options.cases!r} matches none of: {'; '.join(', '.join(name) for name in names)}")
    cases = []
    with stand_in_gpu():
        for preference, block, precision in progress.details(chosen, "launch-cost"):
            path, channels = BLOCKS[block]
            with registry.use("auto", convolution=preference):
                steps = {
                    name: build_step(model.get_submodule(path), channels, name, precision) for name in (OURS, STOCK)
                }
                timing = {"repeat": options.repeat, "min_time": options.min_time}
                samples = measure_interleaved(steps, **timing, label=f"{preference}, {block}", clock=CpuClock())
            cases.append(
                {
                    "name": ", ".join((preference, block, precision)),
                    "providers": {name: values.summary() for name, values in samples.items()},
                }
            )
    return {"cases": cases}


def tables(run: dict[str, Any]) -> str:
    rows = []
    for case in run["cases"]:
        ours, stock = (case["providers"][name] for name in (OURS, STOCK))
        phases = [f"{one['phases_s'][phase] * 1e6:.0f}" for phase in ("forward", "backward") for one in (ours, stock)]
        total = [f"{one['median_s'] * 1e6:.0f}" for one in (ours, stock)]
        rows.append([case["name"], *total, f"{ours['median_s'] / stock['median_s']:.2f}", *phases])
    header = ["bottleneck", "ours us", "stock us", "ours / stock", "forward", "stock", "backward", "stock"]
    settings = "; ".join(f"{key}: {text}" for key, text in {**PREFERENCES, **PRECISIONS}.items())
    return f"launch-cost: median CPU time of a training step without kernels ({settings})\n" + report.table(
        header, rows
    )


def summary(run: dict[str, Any]) -> str:
    return tables(run)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "CPU time that leads to the launches of a bottleneck")
