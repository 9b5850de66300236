"""`launches`: every launch of a step, with its predicted time on a GPU and what bounds it. No GPU is needed.

The networks run on meta tensors, and their launches are recorded (recording.py): ours with grid, threads, shared memory
and registers, PyTorch's with shapes. gpu_model.py and launch_model.py predict their times; docs/predictions.md explains
the model and compares it with published timings. `--write` regenerates the committed predictions (prediction.py).
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import options as common
from benchmarks import plots, report
from benchmarks.events import Event
from benchmarks.gpu_model import GPUS, Gpu, Prediction, predict_all
from benchmarks.launch_model import compiled_works, works_of
from benchmarks.recording import Recorder
from benchmarks.resources import Resources
from benchmarks.stock import MODELS, stock_model
from fused_res import freeze, models

HELP = "every launch of a step with its predicted time on a GPU (calculated)"

#: The backends that ``backend="auto"`` selects on a GPU where both are available: for norms, and for convolutions.
AUTO = "cuda+triton"
BACKENDS = (AUTO, "triton", "cuda")
PREFERENCES = ("planned", "aten", "fused")
MODES = ("train", "infer")
CLASSES = 1000
#: Seconds of CPU time for each launch in eager mode, Python and autograd included. PyTorch: 0.38 ms for a bottleneck's
#: forward and backward, about 28 operators (estimated by reading the code). Ours: so that a bottleneck takes 1.35 times
#: stock's time with Triton's norms and 1.25 times with CUDA C++'s, what `launch-cost` measured on a busy machine.
CPU_SECONDS = {"aten": 13e-6, "triton": 19e-6, "cuda": 17e-6}
#: Launches that are predicted to take longer than this must fill their last wave.
LONG_LAUNCH = 20e-6
MIN_WAVE_EFFICIENCY = 0.85


def _meta_model(name: str, fused: bool) -> nn.Module:
    """Return a model on the meta device with bfloat16 convolutions and float32 norms, as autocast computes."""
    with torch.device("meta"):
        model = getattr(models, name)() if fused else stock_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)
    return model.to(memory_format=torch.channels_last)


def _images(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(batch, 3, size, size, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def record_training(
    model: str, batch: int, backend: str | None = None, preference: str = "planned", size: int = 224
) -> list[Event]:
    """Record a training step under autocast: casts, forward, loss, backward, and SGD with momentum.

    Args:
        model: name of a ResNet.
        batch: images per step.
        backend: backend of fused_res; None: the stock network.
        preference: see :func:`fused_res.dispatch.select`.
        size: height and width of the images.
    """
    network = _meta_model(model, fused=backend is not None)
    parameters = list(network.parameters())
    cast = [p for p in parameters if p.dtype == torch.bfloat16]
    masters = {p: torch.empty_like(p, dtype=torch.float32) if p.dtype == torch.bfloat16 else p for p in parameters}
    optimizer = torch.optim.SGD([nn.Parameter(m) for m in masters.values()], lr=0.1, momentum=0.9, foreach=True)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # the first step creates the momentum buffers
    images = _images(batch, size, torch.float32)
    target = torch.empty(batch, dtype=torch.int64, device="meta")
    with Recorder(backend, preference) as recorder:
        x = images.to(torch.bfloat16)
        for parameter in cast:
            masters[parameter].to(torch.bfloat16)
        F.cross_entropy(network(x).float(), target).backward()
        for parameter in cast:
            assert parameter.grad is not None
            parameter.grad.to(torch.float32)
        optimizer.step()
    return recorder.events


def record_inference(
    model: str, batch: int, backend: str | None = None, preference: str = "planned", size: int = 224
) -> list[Event]:
    """Record one inference in bfloat16, of the frozen network or, without a backend, of the stock network."""
    network = _meta_model(model, fused=False).eval()
    if backend is not None:
        network = freeze(network)
    images = _images(batch, size, torch.bfloat16)
    with Recorder(backend, preference) as recorder, torch.no_grad():
        if backend is not None:
            network(images)  # folds the norms and packs the weights
            recorder.events.clear()
        network(images)
    return recorder.events


RECORD = {"train": record_training, "infer": record_inference}


@dataclass(frozen=True)
class Provider:
    """A way to run the step, and its predicted launches."""

    name: str
    predictions: list[Prediction]
    cpu_seconds: float

    @property
    def gpu_seconds(self) -> float:
        """Seconds of the GPU: also those of the step as a CUDA graph."""
        return sum(one.seconds for one in self.predictions)

    @property
    def eager_seconds(self) -> float:
        return max(self.gpu_seconds, self.cpu_seconds)

    @property
    def gigabytes(self) -> float:
        return sum(one.device_bytes for one in self.predictions) / 1e9


def predict_stock(events: Sequence[Event], gpu: Gpu, norm: str = "native") -> Provider:
    """Predict stock PyTorch in eager mode; ``norm`` as in :func:`benchmarks.launch_model.aten_works`."""
    return Provider(
        "eager-channels-last", predict_all(works_of(events, gpu, norm=norm), gpu), CPU_SECONDS["aten"] * len(events)
    )


def predict_compiled(events: Sequence[Event], gpu: Gpu) -> Provider:
    """Predict torch.compile at its best, in a CUDA graph, from the launches of the stock network."""
    return Provider("compile-channels-last", predict_all(compiled_works(events, gpu), gpu), 0.0)


def predict_ours(name: str, events: Sequence[Event], gpu: Gpu, resources: Resources) -> Provider:
    cpu = sum(CPU_SECONDS[event.backend] for event in events)
    return Provider(name, predict_all(works_of(events, gpu, resources), gpu), cpu)


def provider_name(backend: str, preference: str) -> str:
    """Return the name of a provider of ours: ``ours-cuda`` is planned, ``ours-cuda-norms`` has ATen's convolutions."""
    name = "ours" if backend == AUTO else f"ours-{backend}"
    return name + {"planned": "", "aten": "-norms", "fused": "-fused"}[preference]


def wave_failures(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return the launches of our kernels that take long and leave too much of their last wave empty."""
    return [
        one
        for one in predictions
        if one.work.owner == "ours" and one.seconds > LONG_LAUNCH and one.wave_efficiency < MIN_WAVE_EFFICIENCY
    ]


# The subcommand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=GPUS,
        default="h200",
        help="GPU; our kernels are predicted for compute capability 9.0 only (default: %(default)s)",
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: %(default)s")
    parser.add_argument("--batch", type=common.positive_int, default=256, help="batch size (default: %(default)s)")
    parser.add_argument("--mode", choices=MODES, default="train", help="default: %(default)s")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument("--preference", nargs="+", choices=PREFERENCES, default=list(PREFERENCES), help="default: all")
    parser.add_argument("--write", action="store_true", help="regenerate the committed predictions (takes minutes)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.write:
        from benchmarks import prediction

        prediction.write()
    from benchmarks.prediction import known_resources

    gpu, resources = GPUS[options.device], known_resources()
    record = RECORD[options.mode]
    stock = record(options.model, options.batch)
    providers = [predict_stock(stock, gpu), predict_compiled(stock, gpu)]
    for backend in options.backend if gpu.hopper else ():  # the kernels' resource usage is that of sm_90
        for preference in options.preference:
            events = record(options.model, options.batch, backend, preference)
            resources.measure(events)
            providers.append(predict_ours(provider_name(backend, preference), events, gpu, resources))
    cases = [
        {
            "name": f"{options.model} {options.mode} {options.batch}",
            "batch": options.batch,
            "providers": {
                one.name: {
                    "launches": len(one.predictions),
                    "gigabytes": one.gigabytes,
                    "gpu_s": one.gpu_seconds,
                    "cpu_s": one.cpu_seconds,
                    "table": [_row(p, resources) for p in one.predictions],
                }
                for one in providers
            },
        }
    ]
    return {"device": gpu.peak.name, "cases": cases}


def _row(prediction: Prediction, resources: Resources) -> list[Any]:
    work, event = prediction.work, prediction.work.source
    ours = isinstance(event, Event) and work.owner == "ours"
    kernel = resources.of(event) if ours and isinstance(event, Event) else None
    return [
        work.name,
        "x".join(map(str, event.grid)) if kernel and isinstance(event, Event) else "",
        kernel.threads if kernel else "",
        kernel.shared if kernel else "",
        kernel.registers if kernel else "",
        work.resident if kernel else "",
        f"{prediction.waves:.2f}" if kernel else "",
        f"{prediction.wave_efficiency:.0%}" if kernel else "",
        f"{work.bytes / 1e6:.1f}",
        f"{work.flops / 1e9:.1f}",
        f"{prediction.seconds * 1e6:.1f}",
        prediction.bound,
    ]


HEADER = [
    "kernel", "grid", "threads", "shared", "registers", "blocks/SM", "waves", "wave efficiency", "MB", "GFLOP", "us",
    "bound by",
]  # fmt: skip


def summary(run: dict[str, Any]) -> str:
    parts = [f"launches: predicted for {run['device']}; eager is the longer of GPU and CPU"]
    for case in run["cases"]:
        best = case["providers"].get("compile-channels-last", {}).get("gpu_s", 0.0)
        rows = [
            [
                name,
                one["launches"],
                f"{one['gigabytes']:.1f}",
                report.milliseconds(one["gpu_s"]),
                report.milliseconds(one["cpu_s"]),
                report.milliseconds(max(one["gpu_s"], one["cpu_s"])),
                f"{case['batch'] / one['gpu_s']:.0f}",
                report.ratio(best / one["gpu_s"]),
            ]
            for name, one in case["providers"].items()
        ]
        header = ["launches", "GB", "GPU ms", "CPU ms", "eager ms", "images/s in a graph", "speedup vs compile"]
        parts.append(report.table([case["name"], *header], rows))
    return "\n\n".join(parts)


def tables(run: dict[str, Any]) -> str:
    parts = []
    for case in run["cases"]:
        for name, one in case["providers"].items():
            # Equal launches are one row.
            rows = Counter(map(tuple, one["table"]))
            parts.append(
                f"{case['name']}, {name}\n"
                + report.table([*HEADER, "count"], [[*row, count] for row, count in rows.items()])
            )
    return "\n\n".join([*parts, summary(run)])


def plot(document: dict[str, Any], path: Path) -> None:
    plots.predicted_times(document, path)
