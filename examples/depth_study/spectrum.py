"""Cost of depth: time and memory of training steps and inference, ResNet-18 to -152, fused_res and stock PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import footprint, progress
from benchmarks.cases import Mode
from benchmarks.data import labels, photographs
from benchmarks.providers import INFERENCE_PROVIDERS, PROVIDERS, Provider, build_module
from benchmarks.steps import ModelStep, calibrate_batch_norm
from benchmarks.timing import measure_interleaved
from examples.depth_study.settings import Study, TrainingConfig
from examples.depth_study.store import Store
from fused_res import models, unfuse

CLASSES = 1000
OURS = "ours"
STOCK = ("eager", "eager-channels-last")


@dataclass(frozen=True)
class MeasurementSize:
    """The networks that are measured, their input, and the duration of the measurement.

    Args:
        networks: names in :mod:`fused_res.models`.
        batch: batch size.
        side: side of the square images in pixels.
        rounds: number of interleaved rounds.
        seconds: duration of a round.
    """

    networks: Sequence[str]
    batch: int
    side: int
    rounds: int
    seconds: float


FULL = MeasurementSize(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), 4, 64, 7, 1.0)
QUICK = MeasurementSize(("resnet18", "resnet34", "resnet50"), 2, 32, 3, 0.1)


def training_runs(study: Study) -> list[TrainingConfig]:
    return []


def measure(study: Study, store: Store) -> dict[str, Any]:
    size = QUICK if study.quick else FULL
    networks = [measure_network(name, size, study.backend) for name in progress.cases(size.networks, "spectrum")]
    return {
        "batch": size.batch,
        "side": size.side,
        "threads": torch.get_num_threads(),
        "networks": networks,
    }


def measure_network(name: str, size: MeasurementSize, backend: str) -> dict[str, Any]:
    """Measure parameters, FLOPs, time and memory of one ResNet."""
    torch.manual_seed(0)
    stock = unfuse(getattr(models, name)(num_classes=CLASSES))
    x, target = photographs(size.batch, size.side), labels(size.batch, CLASSES)
    calibrate_batch_norm(stock, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock.eval()(x)
    parameters = sum(parameter.numel() for parameter in stock.parameters())

    def steps(known: dict[str, Provider], mode: Mode) -> dict[str, ModelStep]:
        made = {}
        for provider in (known[OURS], *(known[other] for other in STOCK)):
            images = x.contiguous(memory_format=provider.memory_format)
            made[provider.name] = ModelStep(build_module(provider, stock, backend), images, target, mode)
        return made

    return {
        "name": name,
        "layers": int(name.removeprefix("resnet")),
        "parameters": parameters,
        "flops_per_image": counter.get_total_flops() / size.batch,
        # One mode after the other, so that the model copies of only one are in memory.
        "train": _measured(steps(PROVIDERS, "train"), size, f"{name} training"),
        "infer": _measured(steps(INFERENCE_PROVIDERS, "eval"), size, f"{name} inference"),
    }


def _measured(steps: dict[str, ModelStep], size: MeasurementSize, label: str) -> dict[str, dict[str, float]]:
    """Return, by provider, the median seconds, and the bytes of a step besides parameters and optimizer state."""
    memory = {name: _memory(step) for name, step in steps.items()}
    samples = measure_interleaved(
        {name: step.workload() for name, step in steps.items()},
        repeat=size.rounds,
        min_time=size.seconds,
        label=label,
    )
    return {name: {"median_s": float(f"{samples[name].summary()['median_s']:.4g}"), **memory[name]} for name in steps}


def _memory(step: ModelStep) -> dict[str, float]:
    if step.mode == "eval":
        step.infer()  # packs the weights on the first call
        return {"peak_bytes": footprint.tensor_memory(step.infer).peak}

    def training_step() -> Tensor:
        loss = step.forward()
        loss.backward()
        step.update()
        return loss

    training_step()  # the first step allocates the optimizer's state
    saved = footprint.saved_for_backward(step.forward, step.module, [step.x, step.target])
    return {"peak_bytes": footprint.tensor_memory(training_step).peak, "saved_bytes": saved.total}
