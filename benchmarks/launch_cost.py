"""`launch-cost`: CPU time of the host code of a bottleneck's training step on a GPU, ours and stock PyTorch's.

No GPU is needed, and no kernel runs. Tensors are tiny and on the CPU. Ours is everything that leads to a launch. `ours`
has the norms of the backend `cuda`, as `backend="auto"` has on a GPU; their launches return at once (tools/cuda_sim).
`ours-triton` has Triton's, down to the driver library's launch function, which does nothing (tools/stub_driver).
Convolutions do nothing for all (noop_kernels.cpp). Stock's norms, additions and ReLUs run on the tiny tensors: their
CPU kernels stand for the host code with which ATen selects and launches a CUDA kernel. `eager-empty` is stock with
these operators empty as well, which counts dispatch, autograd and allocation only: a lower bound. Times are CPU times
of the process, because other processes may run.
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
from fused_res import env, functional, fuse
from fused_res.backends import registry

HELP = "CPU time that leads to the launches of a bottleneck's training step, without a GPU"

OURS, TRITON, STOCK, EMPTY = "ours", "ours-triton", "eager-channels-last", "eager-empty"
#: Provider -> the backend that it names, and the one that runs.
BACKENDS = {OURS: ("auto", "cuda+triton"), TRITON: ("triton", "triton")}
#: Channels of the block's input; its output has 64, its inner convolutions 16.
BLOCKS = {"identity": 64, "projection": 32}
PREFERENCES = {"aten": "cuDNN's convolutions", "fused": "fused convolutions"}
PRECISIONS = {"amp": "bf16 autocast", "bf16": "bf16 parameters"}
BATCH, SIZE = 2, 4


class CpuClock(Clock):
    """CPU time of this process."""

    warm_up_calls = 10

    def now(self) -> float:
        return time.process_time()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_cases(parser)
    parser.set_defaults(device="cpu", allocator=allocator.DEFAULT, threads=1, repeat=50)


def load_empty_kernels(name: str, *flags: str) -> None:
    """Replace ATen's CPU kernels by those of noop_kernels.cpp, for the rest of the process."""
    from torch.utils.cpp_extension import load

    source, options = str(Path(__file__).with_name("noop_kernels.cpp")), ["-O2", *flags]
    load(f"fused_res_empty_{name}", [source], extra_cflags=options, is_python_module=False, with_cuda=False)


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[None]:
    """Run the GPU backends on CPU tensors, without executing kernels, and replace ATen's convolutions by empty ones."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("launch-cost: unset TRITON_INTERPRET, the interpreter has no launches to measure")
    try:
        from tools.cuda_sim.simulator import build, load_simulator
        from tools.stub_driver.driver import use_stand_in_driver

        simulator = load_simulator()
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"launch-cost: {error}") from error
    load_empty_kernels("convolutions")
    with (
        mock.patch.dict(os.environ, {env.SIMULATOR.name: str(build())}),
        use_stand_in_driver(),
        simulator.skip_kernels(),
    ):
        resolved = {
            (name, "cpu"): registry._load(backend)
            for names in BACKENDS.values()
            for name, backend in zip(names, names[1:] * 2, strict=True)
        }
        with (
            mock.patch.dict(registry._resolve_cache, resolved),
            mock.patch.object(registry, "unavailable", return_value=None),
        ):
            yield


def build_step(block: nn.Module, channels: int, provider: str, precision: str) -> Workload:
    """Return the phases of a training step of a copy of `block`."""
    module: Any = copy.deepcopy(block).train().to(memory_format=torch.channels_last)
    module = module if precision == "amp" else module.bfloat16()
    if provider in BACKENDS:
        module = fuse(module, backend=BACKENDS[provider][0])
    x = torch.randn(BATCH, channels, SIZE, SIZE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    grad = torch.empty_like(module(x.float() if precision == "amp" else x), dtype=torch.bfloat16)

    if provider in BACKENDS:
        ran = functional.last_plan[next(module.parameters())].config.backend
        assert ran == BACKENDS[provider][1], ran

    def forward(_: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
            output: Tensor = module(x)
        return output

    def backward(output: Tensor) -> None:
        output.backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return {"forward": forward, "backward": backward}


def stock_bottleneck(channels: int) -> nn.Module:
    """Return torchvision's Bottleneck with 64 output channels."""
    projection = None if channels == 64 else nn.Sequential(nn.Conv2d(channels, 64, 1, bias=False), nn.BatchNorm2d(64))
    return type(stock_model("resnet50").get_submodule("layer1.1"))(channels, 16, downsample=projection)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.repeat, options.min_time = 2, 0.0
    names = [(p, b, d) for p in PREFERENCES for b in BLOCKS for d in PRECISIONS]
    chosen = [name for name in names if not options.cases or options.cases in ", ".join(name)]
    if not chosen:
        raise SystemExit(f"--cases {options.cases!r} matches none of: {'; '.join(', '.join(name) for name in names)}")
    results: dict[str, dict[str, Any]] = {}
    with stand_in_gpu():
        for providers in ((OURS, TRITON, STOCK), (EMPTY,)):
            if EMPTY in providers:
                load_empty_kernels("norms", "-DNOOP_NORMS")
            for preference, block, precision in progress.details(chosen, "launch-cost"):
                channels = BLOCKS[block]
                with registry.use("auto", convolution=preference):
                    module = stock_bottleneck(channels)
                    steps = {name: build_step(module, channels, name, precision) for name in providers}
                    timing = {"repeat": options.repeat, "min_time": options.min_time}
                    samples = measure_interleaved(steps, **timing, label=f"{preference}, {block}", clock=CpuClock())
                case = results.setdefault(", ".join((preference, block, precision)), {})
                case |= {name: values.summary() for name, values in samples.items()}
    return {"cases": [{"name": name, "providers": providers} for name, providers in results.items()]}


def tables(run: dict[str, Any]) -> str:
    rows = []
    for case in run["cases"]:
        times = {name: case["providers"][name]["median_s"] for name in (OURS, TRITON, STOCK, EMPTY)}
        microseconds = [f"{seconds * 1e6:.0f}" for seconds in times.values()]
        ratios = [f"{times[ours] / times[stock]:.2f}" for ours in (OURS, TRITON) for stock in (STOCK, EMPTY)]
        rows.append([case["name"], *microseconds, *ratios])
    header = ["bottleneck", "ours us", "triton us", "stock us", "empty us"]
    header += ["ours / stock", "ours / empty", "triton / stock", "triton / empty"]
    settings = "; ".join(f"{key}: {text}" for key, text in {**PREFERENCES, **PRECISIONS}.items())
    title = f"launch-cost: median CPU time of a training step without kernels ({settings})"
    return f"{title}\n{report.table(header, rows)}"


def summary(run: dict[str, Any]) -> str:
    return tables(run)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.speedups(document, path, "CPU time that leads to the launches of a bottleneck")
