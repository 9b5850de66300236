"""Gradient norm of each layer, at initialization and after training, with and without batch norm."""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.depth_study.networks import KINDS, Network, layers
from examples.depth_study.settings import Study, TrainingConfig
from examples.depth_study.store import Store

#: Number of images over which the loss is averaged.
BATCH = 256


def layer_gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Return the Euclidean norm of the loss's gradient with respect to each layer's weight, from input to output.

    The loss is the mean cross entropy, computed with the statistics of this batch.

    Args:
        model: the network; it is in training mode on return, and its running statistics are updated with the batch.
        images: (n, 3, h, w).
        labels: int64, (n,).
    """
    loss = F.cross_entropy(model.train()(images), labels)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers(model)])
    # In float32 the squares of a vanishing gradient would underflow to zero.
    return [gradient.double().norm().item() for gradient in gradients]


def first_to_last_ratio(norms: list[float]) -> float:
    """Return the geometric mean over the first third of the layers divided by that over the last third."""
    count = len(norms) // 3
    # Gradients are exactly zero in a network whose ReLUs are all inactive.
    logarithms = [math.log(max(norm, sys.float_info.min)) for norm in norms]
    return math.exp(statistics.fmean(logarithms[:count]) - statistics.fmean(logarithms[-count:]))


def training_runs(study: Study) -> list[TrainingConfig]:
    return [study.training(kind, depth) for depth in study.probed_depths for kind in KINDS]


def measure(study: Study, store: Store) -> dict[str, Any]:
    """Measure the gradient norms of networks of three depths.

    Returns:
        ``curves``: a list of ``kind, depth, state, norms``, where ``state`` is ``"initial"``, ``"trained"`` or
        ``"initial, no norm"``, and ``norms`` has the :func:`layer_gradient_norms` of each seed (trained: of one seed).
    """
    batch = next(iter(study.data.test_loader(BATCH, split=study.data.train).batches()))
    images = batch.images.contiguous(memory_format=torch.channels_last)

    def norms(network: Network, seed: int, weights: dict[str, Tensor] | None = None) -> list[float]:
        torch.manual_seed(seed)
        model = network.build(study.data.classes, study.backend).to(memory_format=torch.channels_last)
        if weights is not None:
            model.load_state_dict(weights)
        return [float(f"{norm:.5g}") for norm in layer_gradient_norms(model, images, batch.labels)]

    curves = []
    for training in training_runs(study):
        network = training.network
        bare = Network(network.kind, network.depth, network.width, norm=False)
        seeds = range(study.seeds)
        states = {
            "initial": [norms(network, seed) for seed in seeds],
            "trained": [norms(network, training.seed, store.weights(training))],
            "initial, no norm": [norms(bare, seed) for seed in seeds],
        }
        curves += [
            {"kind": network.kind, "depth": network.depth, "state": state, "norms": found}
            for state, found in states.items()
        ]
    return {"batch": len(batch.labels), "curves": curves}
