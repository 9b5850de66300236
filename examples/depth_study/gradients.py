"""How large the loss's gradient is in each layer, at initialisation and after training, with and without norms."""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.depth_study.networks import KINDS, Network, layers
from examples.depth_study.settings import Study, Training
from examples.depth_study.store import Store

#: Images whose mean loss the gradients are of.
BATCH = 256


def layer_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Euclidean norm of the gradient of the mean cross entropy with respect to each layer's weight, from the input to
    the output, with the statistics of this batch.

    Args: model: in training mode on return; its running statistics have seen the batch. images: (n, 3, h, w).
    labels: int64, (n,).
    """
    loss = F.cross_entropy(model.train()(images), labels)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers(model)])
    # The squares of a float32 gradient that vanishes would be zero.
    return [gradient.double().norm().item() for gradient in gradients]


def first_to_last(norms: list[float]) -> float:
    """Geometric mean over the first third of the layers, divided by that over the last third."""
    count = len(norms) // 3
    # In a network that is dead, gradients are zero.
    logarithms = [math.log(max(norm, sys.float_info.min)) for norm in norms]
    return math.exp(statistics.fmean(logarithms[:count]) - statistics.fmean(logarithms[-count:]))


def trainings(study: Study) -> list[Training]:
    return [study.training(kind, depth) for depth in study.landmarks for kind in KINDS]


def measure(study: Study, store: Store) -> dict[str, Any]:
    """``curves``: a list of ``kind, depth, state, norms``, where ``state`` is ``"initial"``, ``"trained"`` or
    ``"initial, no norm"``, and ``norms`` has a list of :func:`layer_gradients` for each seed (trained: of one)."""
    batch = next(iter(study.data.testing(BATCH, split=study.data.train).batches()))
    images = batch.images.contiguous(memory_format=torch.channels_last)

    def norms(network: Network, seed: int, weights: dict[str, Tensor] | None = None) -> list[float]:
        torch.manual_seed(seed)
        model = network.build(study.data.classes, study.backend).to(memory_format=torch.channels_last)
        if weights is not None:
            model.load_state_dict(weights)
        return [float(f"{norm:.5g}") for norm in layer_gradients(model, images, batch.labels)]

    curves = []
    for training in trainings(study):
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
