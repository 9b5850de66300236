"""Inputs that a fused operator rejects or would lay out differently: result and exception are stock PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import freeze, fuse
from tests.support.model_comparison import assert_near, randomize_norms, record_fused_calls


class Unit(nn.Module):
    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=padding), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Residual(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class TwoInputs(Unit):
    """The norm of one input and another tensor, in both orders."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.bn(x) + y), F.relu(y + self.bn(x))


def models(stock: nn.Module) -> list[nn.Module]:
    stock = randomize_norms(stock).double()
    return [stock, fuse(copy.deepcopy(stock)), freeze(stock)]


@pytest.mark.parametrize(
    ("model", "shape", "error"),
    [
        (Unit(0), (2, 4, 2, 2), RuntimeError),  # smaller than the kernel
        (Unit(), (2, 3, 6, 6), RuntimeError),
        (Unit(), (1, 4, 1, 1), ValueError),  # one value per channel
        (Residual(0), (2, 4, 6, 6), RuntimeError),  # the shortcut has another shape
    ],
)
def test_exceptions_are_stocks(model: nn.Module, shape: tuple[int, ...], error: type[Exception]) -> None:
    stock, fused, frozen = models(model)
    x = torch.randn(shape).double()
    for each in (stock, fused):
        with pytest.raises(error) as raised:
            each(x)
        assert raised.type is error
    if error is RuntimeError:
        with pytest.raises(error) as raised:
            frozen(x)
        assert raised.type is error
    for ours, theirs in zip(fused.state_dict().values(), stock.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_broadcast_sum_equals_stock() -> None:
    """One pixel minus nothing: the convolution enlarges the input, and PyTorch broadcasts the shortcut."""
    stock, fused, frozen = models(Residual(2))
    x = torch.randn(3, 4, 1, 1).double()
    with torch.no_grad():
        assert_near(frozen(x), stock.eval()(x), "evaluation")
    assert_near(fused(x), stock.train()(x), "training")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_sum_has_stocks_memory_format(layout: str) -> None:
    stock, fused, frozen = models(Residual())
    x = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(2, 3),
        "sliced": lambda t: torch.cat([t, t], 1)[:, :4],
    }[layout](torch.randn(2, 4, 6, 6).double())
    with record_fused_calls() as calls:
        actual, expected = fused(x), stock(x)
    assert_near(actual, expected, "output")
    assert actual.stride() == expected.stride()
    assert calls == ([] if layout == "transposed" else ["residual_block"])
    with torch.no_grad():
        assert frozen(x).is_contiguous() == stock.eval()(x).is_contiguous()


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [torch.contiguous_format, torch.channels_last])
def test_sum_of_two_memory_formats_has_stocks(first: torch.memory_format, second: torch.memory_format) -> None:
    stock, fused, _ = models(TwoInputs())
    x, y = (torch.randn(2, 4, 6, 6).double().to(memory_format=format) for format in (first, second))
    for actual, expected in zip(fused(x, y), stock(x, y), strict=True):
        assert_near(actual, expected, "output")
        assert actual.stride() == expected.stride()


class Projected(Unit):
    """The norm of a convolution and another tensor, in both orders."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.bn(self.conv(x)) + y), F.relu(y + self.bn(self.conv(x)))


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [torch.contiguous_format, torch.channels_last])
def test_frozen_sum_of_two_memory_formats_has_stocks(first: torch.memory_format, second: torch.memory_format) -> None:
    stock, _, frozen = models(Projected())
    x, y = (torch.randn(2, 4, 6, 6).double().to(memory_format=format) for format in (first, second))
    with torch.no_grad():
        for actual, expected in zip(frozen(x, y), stock.eval()(x, y), strict=True):
            assert_near(actual, expected, "output")
            assert actual.stride() == expected.stride()
