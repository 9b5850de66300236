"""What depth costs: ResNet-18 to ResNet-152, a training step and an inference, with our kernels and without."""

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
from benchmarks.providers import INFERENCE, PROVIDERS, Provider, build_module
from benchmarks.steps import ModelStep, calibrate
from benchmarks.timing import measure_interleaved
from examples.depth_study.settings import Study, Training
from examples.depth_study.store import Store
from fused_res import models, unfuse

CLASSES = 1000
OURS = "ours"
STOCK = ("eager", "eager-channels-last")


@dataclass(frozen=True)
class Size:
    """Of what is measured: networks by name, and for how long."""

    networks: Sequence[str]
    batch: int
    side: int
    rounds: int
    seconds: float


FULL = Size(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), 4, 64, 7, 1.0)
QUICK = Size(("resnet18", "resnet34", "resnet50"), 2, 32, 3, 0.1)


def trainings(study: Study) -> list[Training]:
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


def measure_network(name: str, size: Size, backend: str) -> dict[str, Any]:
    """Parameters, FLOPs, time and memory of one ResNet."""
    torch.manual_seed(0)
    stock = unfuse(getattr(models, name)(num_classes=CLASSES))
    x, target = photographs(size.batch, size.side), labels(size.batch, CLASSES)
    calibrate(stock, x)
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
        # One after the other, so that the copies of only one are in memory.
        "train": _measured(steps(PROVIDERS, "train"), size, f"{name} training"),
        "infer": _measured(steps(INFERENCE, "eval"), size, f"{name} inference"),
    }


def _measured(steps: dict[str, ModelStep], size: Size, label: str) -> dict[str, dict[str, float]]:
    """By provider: median seconds, and the bytes that a step needs besides parameters and optimizer."""
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
        step.infer()  # packs weights, once
        return {"peak_bytes": footprint.tensor_memory(step.infer).peak}

    def whole() -> Tensor:
        loss = step.forward()
        loss.backward()
        step.update()
        return loss

    whole()  # the optimizer's state is there from the second step on
    saved = footprint.saved_for_backward(step.forward, step.module, [step.x, step.target])
    return {"peak_bytes": footprint.tensor_memory(whole).peak, "saved_bytes": saved.total}
