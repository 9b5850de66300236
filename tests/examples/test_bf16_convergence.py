"""Training in bfloat16 autocast converges like stock PyTorch's: they differ by no more than two seeds of stock do.

Networks start from the same weights and get the same batches. Rounding makes two runs diverge within a few dozen steps,
so losses are averaged over epochs, and the distances between ours and stock over seeds.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from examples import data
from examples.schedule import lr_factor
from fused_res.testing import stub_torchvision_operators
from tests.backends.cpu.test_conv_training import threads
from tests.support import bf16_training as bf16

pytestmark = bf16.needs_bf16_products


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small kernels spend more time in barriers than in work if another process uses the cores."""
    with threads(1):
        yield


class Curve(NamedTuple):
    """Results of a training run."""

    early_loss: float  #: mean training loss of the first half
    late_loss: float  #: mean training loss of the last quarter
    test_loss: float  #: in evaluation mode, so with the running statistics
    test_error: float  #: share of wrong classes


def train(model: Any, batches: list[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], lr: float) -> Curve:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step, (x, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, len(batches), len(batches) // 10)
        optimizer.zero_grad()
        loss = bf16.loss_of(model, x.contiguous(memory_format=torch.channels_last), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    x, labels = test
    with torch.no_grad(), bf16.autocast():
        outputs = model(x.contiguous(memory_format=torch.channels_last)).float()
    early, late = losses[: len(losses) // 2], losses[-(len(losses) // 4) :]
    return Curve(
        sum(early) / len(early),
        sum(late) / len(late),
        float(F.cross_entropy(outputs, labels)),
        float((outputs.argmax(1) != labels).float().mean()),
    )


def assert_like_another_seed(ours: list[Curve], stock: list[Curve]) -> None:
    """Compare the mean distance between ours and stock, seed by seed, with the largest between two seeds of stock.

    If ours were stock with independent rounding and every run another sample of the same distribution, the first would
    be 1.1 standard deviations and the second, of four seeds, 2.1.
    """
    lines = []
    for name in Curve._fields:
        mine, theirs = ([getattr(curve, name) for curve in curves] for curves in (ours, stock))
        distance = sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / len(mine)
        spread = max(theirs) - min(theirs)
        print(f"{name}: ours {mine}, stock {theirs}: distance {distance:.4g}, spread of stock {spread:.4g}")
        if not distance <= spread:
            lines.append(f"{name}: distance {distance:.4g}, spread of stock {spread:.4g}")
    assert not lines, "; ".join(lines)


@pytest.mark.usefixtures("one_thread")
def test_small_network_on_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    (test,) = digits.test_loader(360).batches()
    ours, stock = [], []
    for seed in range(4):
        loader = digits.train_loader(64, seed=seed)
        batches = [(batch.images, batch.labels) for epoch in range(4) for batch in loader.batches(epoch)]
        torch.manual_seed(seed)
        network = bf16.Network().to(memory_format=torch.channels_last)
        for model, curves in ((bf16.fused(network), ours), (network, stock)):
            curves.append(train(model, batches, (test.images, test.labels), 0.1))
    assert_like_another_seed(ours, stock)
    assert max(curve.test_error for curve in ours) <= 0.05


@pytest.mark.usefixtures("one_thread")
def test_gradients_along_a_training_run_are_as_accurate_as_stocks() -> None:
    """At weights that training has reached, with momentum's small and large gradients, not only at initial ones."""
    pytest.importorskip("sklearn")
    loader = data.load("digits").train_loader(64)
    torch.manual_seed(0)
    network = bf16.Network().to(memory_format=torch.channels_last)
    models = bf16.fused(network), copy.deepcopy(network), copy.deepcopy(network).double()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    gradients: list[list[Tensor]] = [[], [], []]
    statistics: list[list[Tensor]] = [[], [], []]
    for step, batch in enumerate(itertools.chain(loader.batches(0), loader.batches(1))):
        x = batch.images.bfloat16().float().contiguous(memory_format=torch.channels_last)
        if step % 8 == 0:
            for model, gradient, statistic in zip(models, gradients, statistics, strict=True):
                exact = model is models[2]
                model.load_state_dict(network.state_dict())
                bf16.round_convolutions(model)
                model.zero_grad()
                loss = bf16.loss_of(model, x.double() if exact else x, batch.labels, None if exact else torch.bfloat16)
                loss.backward()
                gradient.append(bf16.flat(bf16.gradients_of(model)))
                statistic.append(bf16.flat(bf16.buffers_of(model)))
        optimizer.zero_grad()
        bf16.loss_of(network, x, batch.labels).backward()
        optimizer.step()
    for found in (gradients, statistics):
        # Of a single batch, a few activations that are zero up to rounding decide the error.
        scales = [exact.norm() for exact in found[2]]
        joined = (torch.cat([v / s for v, s in zip(values, scales, strict=True)]) for values in found)
        bf16.assert_error_at_most_stocks(*({"all steps": values} for values in joined))
    # A gradient that is too long or too short trains at another rate, whatever its rounding errors are.
    for step, (ours, exact) in enumerate(zip(gradients[0], gradients[2], strict=True)):
        assert abs(float(ours @ exact / (exact @ exact)) - 1) <= 0.02, step


def patterns(seed: int, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate batches of 10 classes: each a fixed coarse pattern, shifted, of random contrast, in noise."""
    shapes = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1234))
    shapes = F.interpolate(shapes, (64, 64), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(10, (size,), generator=generator)
        contrast = torch.rand(size, 1, 1, 1, generator=generator) + 0.5
        shifts = torch.randint(-8, 9, (size, 2), generator=generator).tolist()
        moved = [shapes[label].roll(shift, (1, 2)) for label, shift in zip(labels.tolist(), shifts, strict=True)]
        yield torch.stack(moved) * contrast + 2 * torch.randn(size, 3, 64, 64, generator=generator), labels


@pytest.mark.full
def test_resnet18_on_patterns() -> None:
    """200 steps of 16 images of 64x64."""
    stub_torchvision_operators()
    from torchvision.models import resnet18

    (test,) = patterns(99, 1, 256)
    ours, stock = [], []
    for seed in range(4):
        batches = list(patterns(seed, 200, 16))
        torch.manual_seed(seed)
        network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
        for model, curves in ((bf16.fused(network), ours), (network, stock)):
            curves.append(train(model, batches, test, 0.01))
    assert_like_another_seed(ours, stock)
    assert max(curve.test_error for curve in ours) <= 0.2
