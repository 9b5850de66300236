"""Measure residual blocks whose last norm is zero: they return relu(x), the identity on non-negative inputs.

The blocks are measured alone, in a newly initialized network, and appended to the stages of a trained one. The section
also compares shortcuts that span one, two, three and four layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.depth_study import gradients
from examples.depth_study.networks import KINDS, STAGES, Network, blocks, deepen, zero_last_norm
from examples.depth_study.settings import Study, TrainingConfig
from examples.depth_study.store import Store
from examples.depth_study.training import evaluate
from fused_res.models import cifar_resnet
from fused_res.nn import ResidualBlock

SPANS = (1, 2, 3, 4)
#: 12 layers per stage, a multiple of every span.
SPAN_DEPTH = 38
#: Blocks added to each stage of a trained network: 20 layers become 56.
ADDED_BLOCKS = 6


def by_span(study: Study) -> list[TrainingConfig]:
    """Return the plain network and the residual networks of all spans, all of the same depth."""
    spans = [study.training("residual", SPAN_DEPTH, span=span) for span in SPANS]
    return [study.training("plain", SPAN_DEPTH), *spans]


def training_runs(study: Study) -> list[TrainingConfig]:
    return [*by_span(study), *(study.training(kind, study.shallow) for kind in KINDS)]


def measure(study: Study, store: Store) -> dict[str, Any]:
    return {
        "single": [single_block(span, shortcut, study) for shortcut in ("identity", "none") for span in SPANS],
        "fresh": fresh_network(study),
        "deepened": [deepened_network(study, store, kind) for kind in KINDS],
        "spans": spans(study, store),
    }


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


def single_block(span: int, shortcut: str, study: Study) -> dict[str, Any]:
    """Measure how far the output of a zeroed block of `span` layers is from relu(x), and from zero.

    The inputs have both signs; the result is the larger value of training and eval mode.
    """
    torch.manual_seed(0)
    width = study.width
    units = [(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)) for _ in range(span)]
    block = zero_last_norm(ResidualBlock(units, shortcut, backend=study.backend))
    block.to(memory_format=torch.channels_last)
    x = torch.randn(32, width, study.data.size, study.data.size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = [block.train(mode)(x) for mode in (True, False)]
    return {
        "span": span,
        "shortcut": shortcut,
        "from_relu": max(difference(output, x.relu()) for output in outputs),
        "from_zero": max(output.abs().max().item() for output in outputs),
    }


def fresh_network(study: Study) -> dict[str, Any]:
    """Measure how far each block's output is from its input, in a new network with ``zero_init_residual``.

    Returns:
        ``depth``, and ``blocks``: for each block ``projects`` (whether its shortcut is a projection) and
        ``difference`` (the largest absolute one, or None where the shapes of input and output differ).
    """
    torch.manual_seed(0)
    model = cifar_resnet(
        study.deep, study.data.classes, width=study.width, zero_init_residual=True, backend=study.backend
    )
    model.to(memory_format=torch.channels_last)
    differences: list[dict[str, Any]] = []

    def record(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = inputs
        same = x.shape == output.shape
        projects = block.downsample is not None
        differences.append({"projects": projects, "difference": difference(output, x) if same else None})

    for block in blocks(model):
        block.register_forward_hook(record)
    with torch.no_grad():
        model(_images(study))
    return {"depth": study.deep, "blocks": differences}


def deepened_network(study: Study, store: Store, kind: str) -> dict[str, Any]:
    """Compare the shallowest trained network with a copy that is deepened by zeroed blocks."""
    training = study.training(kind, study.shallow)
    model = training.network.build(study.data.classes, study.backend)
    model.load_state_dict(store.weights(training))
    model.to(memory_format=torch.channels_last).eval()
    deeper = deepen(model, ADDED_BLOCKS, study.backend).to(memory_format=torch.channels_last)
    images = _images(study)
    with torch.no_grad():
        before, after = model(images), deeper(images)
    return {
        "kind": kind,
        "from": study.shallow,
        "to": study.shallow + 2 * ADDED_BLOCKS * len(STAGES),
        "difference": difference(before, after),
        "largest": before.abs().max().item(),
        "test_error": evaluate(model, study.data, study.data.test)[1],
        "test_error_deeper": evaluate(deeper, study.data, study.data.test)[1],
    }


def spans(study: Study, store: Store) -> list[dict[str, Any]]:
    """Return final errors and initial gradient ratios of networks of one depth, by the span of a shortcut."""
    batch = next(iter(study.data.test_loader(gradients.BATCH, split=study.data.train).batches()))
    rows = []
    for training in by_span(study):
        network: Network = training.network
        torch.manual_seed(training.seed)
        model = network.build(study.data.classes, study.backend).to(memory_format=torch.channels_last)
        norms = gradients.layer_gradient_norms(
            model, batch.images.contiguous(memory_format=torch.channels_last), batch.labels
        )
        result = store.result(training)
        assert result is not None
        rows.append(
            {
                "kind": network.kind,
                "span": network.span if network.kind == "residual" else None,
                "depth": network.depth,
                "blocks": len(blocks(model)),
                "gradient_ratio": gradients.first_to_last_ratio(norms),
                "train_error": result["train_error"],
                "train_loss": result["train_loss"],
                "test_error": result["test_error"],
            }
        )
    return rows


def _images(study: Study) -> Tensor:
    batch = next(iter(study.data.test_loader(gradients.BATCH).batches()))
    return batch.images.contiguous(memory_format=torch.channels_last)
