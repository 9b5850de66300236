"""Cached calls of fused chains: repeated calls are equal to stock, and every change of the modules is seen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_res
from fused_res.nn.cached_call import CachedCall

F64 = {"dtype": torch.float64}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, **F64), nn.BatchNorm2d(4, **F64)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False, **F64), nn.BatchNorm2d(4, **F64)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


@pytest.fixture
def pair() -> tuple[Block, Block]:
    torch.manual_seed(0)
    stock = Block()
    return stock, fused_res.fuse(copy.deepcopy(stock))


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each look-up of a cached call found a valid one."""
    found: list[bool] = []
    original = CachedCall.run

    def run(self: CachedCall, input: Tensor) -> Tensor | None:
        output = original(self, input)
        found.append(output is not None)
        return output

    monkeypatch.setattr(CachedCall, "run", run)
    return found


def step(model: Block, x: Tensor) -> tuple[Tensor, ...]:
    """Run a call, with its backward if there is one, and return all that it computes."""
    model.zero_grad()
    y = model(x)
    if y.requires_grad:
        (y * torch.arange(y.numel(), **F64).view_as(y).cos()).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return y.detach(), *grads, *[buffer.clone() for buffer in model.buffers()]


def assert_equal_steps(pair: tuple[Block, Block], x: Tensor) -> None:
    expected, actual = step(pair[0], x), step(pair[1], x)
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def image(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=torch.Generator().manual_seed(seed), **F64)


@pytest.mark.parametrize("training", [True, False])
def test_repeated_calls_use_the_cache_and_equal_stock(
    pair: tuple[Block, Block], hits: list[bool], training: bool
) -> None:
    for model in pair:
        model.train(training)
    for seed in range(4):
        assert_equal_steps(pair, image(seed))
    assert hits == [True] * 3


def test_values_written_in_place_are_read(pair: tuple[Block, Block], hits: list[bool]) -> None:
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in pair]
    for seed in range(3):
        assert_equal_steps(pair, image(seed))
        for optimizer in optimizers:
            optimizer.step()
    pair[0].load_state_dict(pair[1].state_dict())
    for model in pair:
        model.bn1.running_var.mul_(2)
        model.eval()
    assert_equal_steps(pair, image(9))
    assert hits == [True, True, False]  # False: training has changed


def replace_weight(model: Block) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * 2)


def replace_statistics(model: Block) -> None:
    model.bn2.running_mean = model.bn2.running_mean + 1


def replace_data(model: Block) -> None:
    model.conv2.weight.data = model.conv2.weight.detach()[:, :, 1:2, 1:2].clone()
    model.conv2.kernel_size, model.conv2.padding = (1, 1), (0, 0)


CHANGES: dict[str, Callable[[Block], object]] = {
    "weight replaced": replace_weight,
    "running statistics replaced": replace_statistics,
    "shape of a weight's data": replace_data,
    "bias removed": lambda model: model.conv1.register_parameter("bias", None),
    "frozen parameter": lambda model: model.conv1.weight.requires_grad_(False),
    "eps": lambda model: setattr(model.bn1, "eps", 0.5),
    "momentum": lambda model: setattr(model.bn1, "momentum", 0.7),
    "cumulative average": lambda model: setattr(model.bn1, "momentum", None),
    "no running statistics": lambda model: setattr(model.bn2, "track_running_stats", False),
    "one norm in evaluation mode": lambda model: model.bn2.eval(),
    "all in evaluation mode": lambda model: model.eval(),
    "dilation": lambda model: (setattr(model.conv1, "dilation", (2, 2)), setattr(model.conv1, "padding", (2, 2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_modules(pair: tuple[Block, Block], hits: list[bool], change: str) -> None:
    for seed in range(2):
        assert_equal_steps(pair, image(seed))
    for model in pair:
        CHANGES[change](model)
    for seed in range(2, 5):
        assert_equal_steps(pair, image(seed))
    assert hits[:2] == [True, False]
    assert change == "cumulative average" or hits[2:] == [True, True]


def test_list_attribute_changed_in_place(pair: tuple[Block, Block], hits: list[bool]) -> None:
    for model in pair:
        model.conv1.dilation, model.conv1.padding = [1, 1], [1, 1]
    assert_equal_steps(pair, image(0))
    for model in pair:
        model.conv1.dilation[:], model.conv1.padding[:] = [2, 2], [2, 2]
    assert_equal_steps(pair, image(1))
    assert hits == []


@pytest.mark.parametrize(
    "inputs",
    [
        (image(0), image(1, 3, 4, 6, 6)),
        (image(0), image(1, 2, 4, 5, 7)),
        (image(0), image(1).contiguous(memory_format=torch.channels_last)),
        (image(0), image(1).requires_grad_()),
        (image(0), image(1).transpose(2, 3)),
    ],
    ids=["batch", "size", "memory format", "requires_grad", "strides"],
)
def test_other_inputs(pair: tuple[Block, Block], hits: list[bool], inputs: tuple[Tensor, Tensor]) -> None:
    for x in (*inputs, *inputs):
        assert_equal_steps(pair, x)
        assert step(pair[1], x)[0].stride() == step(pair[0], x)[0].stride()
    assert False in hits


def test_grad_mode_autocast_and_settings(pair: tuple[Block, Block], hits: list[bool]) -> None:
    contexts = (
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: fused_res.backends.use("reference"), lambda: torch.backends.mkldnn.flags(enabled=False),
    )  # fmt: skip
    stock, fused = (model.float() for model in pair)
    x = image(0).float()
    for context in contexts:
        for _ in range(2):
            torch.testing.assert_close(fused(x), stock(x))
        del hits[:]
        with context():
            expected, actual = stock(x), fused(x)
        assert expected.dtype is actual.dtype and expected.requires_grad is actual.requires_grad
        torch.testing.assert_close(actual, expected, rtol=2e-2 if expected.dtype is torch.bfloat16 else 1e-4, atol=1e-2)
        assert hits == [False], context
        stock.load_state_dict(fused.state_dict())


def test_copies_do_not_share_calls(pair: tuple[Block, Block], hits: list[bool]) -> None:
    stock, fused = pair
    fused(image(0))
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        twin.conv1.weight.mul_(3)
    stock.load_state_dict(twin.state_dict())
    assert_equal_steps((stock, twin), image(1))
    assert hits == []


def test_checkpoint_counts_a_batch_once(pair: tuple[Block, Block], hits: list[bool]) -> None:
    stock, fused = pair
    for seed in range(2):
        x = image(seed).requires_grad_()
        stock(x)
        torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False).sum().backward()
    for (name, expected), actual in zip(pair[0].named_buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)
    assert True in hits


def test_thread_safety(pair: tuple[Block, Block]) -> None:
    """Threads that alternate shapes get the results of their own inputs."""
    from concurrent.futures import ThreadPoolExecutor

    stock, fused = (model.eval() for model in pair)
    shapes = itertools.islice(itertools.cycle([(1, 4, 6, 6), (2, 4, 5, 5), (3, 4, 4, 4)]), 90)
    inputs = [image(seed, *shape) for seed, shape in enumerate(shapes)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(torch.no_grad()(fused), inputs))
        for x, y in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(y, stock(x))
