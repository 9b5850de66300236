"""Measurement of one model of the zoo: comparison in float64, counts of norms, and interleaved times in float32."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.steps import LEARNING_RATE, MOMENTUM
from benchmarks.timing import Workload, measure_interleaved
from benchmarks.zoo.compare import compare
from benchmarks.zoo.models import ZOO, ZooModel
from fused_res import freeze, fuse
from fused_res.report.comparison import named_tensors

#: Names of the times of a row. The prefix tells `compare` which of them are of fused_res.
TRAINING, EVALUATION, FROZEN = "ours training", "ours evaluation", "ours frozen"
STOCK_TRAINING, STOCK_EVALUATION = "stock training", "stock evaluation"
#: The time of stock PyTorch that each time of fused_res is compared with.
BASELINES = {TRAINING: STOCK_TRAINING, EVALUATION: STOCK_EVALUATION, FROZEN: STOCK_EVALUATION}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        seed: seed of weights and inputs.
        threads: number of PyTorch threads; None: chosen by PyTorch.
        repeat: minimum number of rounds.
        min_time: seconds to time each variant of a model in each mode; None: compare and count only.
    """

    seed: int = 0
    threads: int | None = None
    repeat: int = 5
    min_time: float | None = 1.0


class Training:
    """Training steps: forward, backward for a fixed gradient of each output, SGD with momentum."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model.train(), x
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
        self.grads: list[Tensor] = []

    def forward(self, _: Any) -> list[Tensor]:
        outputs = named_tensors("output", self.model(self.x)).values()
        return [output for output in outputs if output.requires_grad]

    def backward(self, outputs: list[Tensor]) -> None:
        if not self.grads:
            self.grads = [torch.full_like(output, 1 / output.numel()) for output in outputs]
        torch.autograd.backward(outputs, self.grads)

    def update(self, _: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def workload(self) -> Workload:
        return {"forward": self.forward, "backward": self.backward, "optimizer": self.update}


def evaluation(model: nn.Module, x: Tensor) -> Workload:
    def infer(_: Any) -> Any:
        with torch.no_grad():
            return model(x)

    return {"forward": infer}


def times(stock: nn.Module, shape: tuple[int, ...], settings: Settings, label: str) -> dict[str, Any]:
    """Return the times of training steps, evaluation and frozen evaluation, each interleaved with stock PyTorch.

    Args:
        stock: the model in float32; it is converted to channels_last.
        shape: shape of the input.
        settings: duration of the measurement.
        label: label of the progress bar.
    """
    if settings.min_time is None:
        return {}
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    stock = stock.to(memory_format=layout)
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.rand(shape, generator=generator).to(memory_format=layout)
    calibrate(stock, x)
    evaluated = {
        STOCK_EVALUATION: evaluation(copy.deepcopy(stock).eval(), x),
        EVALUATION: evaluation(fuse(copy.deepcopy(stock)).eval(), x),
        FROZEN: evaluation(freeze(stock), x),
    }
    trained = {
        STOCK_TRAINING: Training(stock, x).workload(),
        TRAINING: Training(fuse(copy.deepcopy(stock)), x).workload(),
    }
    found: dict[str, Any] = {}
    for mode, workloads in (("evaluation", evaluated), ("training", trained)):
        samples = measure_interleaved(
            workloads, repeat=settings.repeat, min_time=settings.min_time, label=f"{label} {mode}"
        )
        for name, one in samples.items():
            found[name] = {key: value for key, value in one.summary().items() if key != "samples_s"}
    return found


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics to the statistics of `x`: those of a new model let activations grow or vanish."""
    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def speedups(row: Row) -> dict[str, float]:
    """Return the time of stock PyTorch over that of fused_res, by the name of the latter."""
    providers = row["providers"]
    return {
        name: providers[stock]["median_s"] / providers[name]["median_s"]
        for name, stock in BASELINES.items()
        if name in providers
    }


def provenance() -> Row:
    """Return the date and the commit of a measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": environment.commit(),
    }


def measure(model: ZooModel, settings: Settings) -> Row:
    """Return the row of one model, as plain data."""
    torch.manual_seed(settings.seed)
    compared = compare(model.build(), model.compared_shape)
    torch.manual_seed(settings.seed)
    return {
        "name": model.title,
        "package": model.package,
        "version": environment.version_of(model.package.replace("_", "-")),
        "shape": list(model.shape),
        "norms": {mode: list(counts) for mode, counts in compared.norms.items()},
        "errors": compared.errors,
        "reasons": compared.reasons,
        **provenance(),
        "providers": times(model.build(), model.shape, settings, model.title),
    }


def work(connection: Connection, titles: list[str], settings: Settings) -> None:
    """Measure models in a process of its own and send a row, or the text of an exception, for each."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    models = {model.title: model for model in ZOO}
    for title in titles:
        try:
            connection.send(measure(models[title], settings))
        except Exception as error:
            text = str(error).strip().splitlines()
            connection.send(f"{type(error).__name__}: {text[0] if text else ''}")
