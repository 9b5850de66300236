"""Pre-activation blocks: norm and ReLU before each convolution, an addition at the end, compared in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import freeze, fuse, summarize
from fused_res.nn import packed_steps
from fused_res.testing import assert_within_stock_error, stub_torchvision_operators
from tests.support.model_comparison import (
    assert_models_match,
    assert_near,
    randomize_norms,
    record_fused_calls,
    record_stock_norms,
)

LAYOUTS = (torch.contiguous_format, torch.channels_last)
#: Packed convolutions of a block: whether a residual is added, and whether a ReLU follows.
PACKED_BLOCK = [(False, True), (True, False)]


class Block(nn.Module):
    """He et al., Identity mappings in deep residual networks, 2016."""

    def __init__(
        self, in_channels: int = 4, channels: int = 4, conv: Any = nn.Conv2d, norm: Any = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), conv(in_channels, channels, 3, padding=1, bias=False)
        self.norm2, self.conv2 = norm(channels), conv(channels, channels, 3, padding=1)
        self.shortcut = None if in_channels == channels else conv(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.norm2(self.conv1(out))))
        return out + shortcut


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out), inplace=True))
        out += x
        return out


class ShortcutFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ReluAtTheEnd(Block):
    """The residual branch ends in a convolution, and a ReLU follows the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))))) + x)


class Broadcast(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(self.conv1(x)))) + x.mean((2, 3), keepdim=True)


class ReadTwice(Block):
    """The last convolution's output has another reader, so the addition may not run in its epilogue."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.norm2(self.conv1(x))))
        return (out + x) * out


def stock_of(block: Callable[..., nn.Module] = Block, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomize_norms(block(**options)).double().eval()


def images(layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 7, 6, dtype=dtype).to(memory_format=layout)


@contextmanager
def record_packed() -> Iterator[list[tuple[bool, bool]]]:
    """Record every packed convolution: whether a residual is added in its epilogue, and whether a ReLU follows."""
    ran: list[tuple[bool, bool]] = []
    dispatch = packed_steps.registry.dispatch_conv_bias_act

    def record(
        kernels: Any, x: Tensor, weight: Any, bias: Any, residual: Any, geometry: Any, relu: bool, *rest: Any
    ) -> Any:
        ran.append((residual is not None, relu))
        return dispatch(kernels, x, weight, bias, residual, geometry, relu, *rest)

    packed_steps.registry.dispatch_conv_bias_act = record
    try:
        yield ran
    finally:
        packed_steps.registry.dispatch_conv_bias_act = dispatch


class TestTraining:
    @pytest.mark.parametrize("block", [Block, InPlace, ShortcutFirst, ReluAtTheEnd, Broadcast, ReadTwice])
    def test_every_norm_runs_fused(self, block: type[Block]) -> None:
        stock = stock_of(block).train()
        fused = fuse(copy.deepcopy(stock))
        with record_stock_norms() as left, record_packed() as ran:
            copy.deepcopy(fused)(images())
            copy.deepcopy(fused).eval()(images())
        assert (left, ran) == ([], [])
        assert_models_match(fused, stock, images().requires_grad_())


class TestFrozen:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize(
        ("block", "expected"),
        [
            (Block, PACKED_BLOCK),
            (InPlace, PACKED_BLOCK),
            (ShortcutFirst, PACKED_BLOCK),
            (ReluAtTheEnd, [(False, True), (True, True)]),
            (Broadcast, []),  # the norm runs with PyTorch's convolutions
            (ReadTwice, [(False, True)]),
        ],
    )
    def test_last_convolution_adds_in_its_epilogue(
        self, block: type[Block], expected: list[tuple[bool, bool]], layout: torch.memory_format
    ) -> None:
        stock = stock_of(block)
        frozen = freeze(stock)
        with record_packed() as ran, record_stock_norms() as left, torch.no_grad():
            output = frozen(images(layout))
        assert (ran, left) == (expected, [])
        with torch.no_grad():
            reference = stock(images(layout))
        assert_near(output, reference, "output")
        assert output.stride() == reference.stride()

    def test_projection(self) -> None:
        stock = stock_of(channels=6)
        with record_packed() as ran, torch.no_grad():
            assert_near(freeze(stock)(images()), stock(images()), "output")
        assert ran == PACKED_BLOCK

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_dtype(self, dtype: torch.dtype, layout: torch.memory_format) -> None:
        stock = stock_of().to(dtype)
        exact, x = copy.deepcopy(stock).double(), images(layout, dtype)
        with record_packed() as ran, torch.no_grad():
            output = freeze(stock)(x)
            assert_within_stock_error("output", output, stock(x), exact(x.double()), floor=1e-6)
        # An inference graph runs all but the convolution that adds another tensor than its input.
        assert ran == PACKED_BLOCK[1:]

    @pytest.mark.parametrize("dim", [1, 3])
    def test_other_dimensions(self, dim: int) -> None:
        layers = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dim]
        stock = stock_of(conv=layers[0], norm=layers[1])
        x = torch.randn(2, 4, *(5, 6, 7)[:dim], dtype=torch.float64)
        with record_packed() as ran, torch.no_grad():
            assert_near(freeze(stock)(x), stock(x), "output")
        assert ran == PACKED_BLOCK

    @pytest.mark.parametrize(
        ("conv", "expected"),
        [
            (lambda: nn.Conv2d(4, 4, 3, padding="same", bias=False), PACKED_BLOCK),
            (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), PACKED_BLOCK),
            (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), []),
        ],
        ids=["same", "dilated groups", "reflect"],
    )
    def test_settings_of_the_last_convolution(
        self, conv: Callable[[], nn.Module], expected: list[tuple[bool, bool]]
    ) -> None:
        stock = stock_of()
        stock.conv2 = conv().double()
        frozen = freeze(stock)
        with record_packed() as ran, record_fused_calls() as calls, torch.no_grad():
            assert_near(frozen(images()), stock(images()), "output")
        assert ran == expected and "batch_norm_act" in calls

    def test_changed_weights_are_packed_again(self) -> None:
        frozen = freeze(stock_of())
        with torch.no_grad():
            frozen(images())
            for change in (
                lambda: frozen.conv2.weight.mul_(2),
                lambda: frozen.conv2.bias.add_(1),
                lambda: setattr(frozen.conv2, "bias", None),
                lambda: frozen.norm2.running_var.add_(1),
            ):
                change()
                stock = Block().double().eval()
                if frozen.conv2.bias is None:
                    stock.conv2.bias = None
                stock.load_state_dict(frozen.state_dict())
                assert_near(frozen(images()), stock(images()), "output")

    def test_gradients(self) -> None:
        stock = stock_of()
        frozen = freeze(stock)
        with record_packed() as ran:
            assert_models_match(frozen.requires_grad_(), copy.deepcopy(stock), images().requires_grad_())
        assert not ran
        for name in ("conv2.weight", "conv2.bias"):
            stock, frozen = stock_of(), freeze(stock_of())
            for model in (stock, frozen):
                model.requires_grad_(False).get_parameter(name).requires_grad_()
            with record_packed() as ran:
                assert_models_match(frozen, stock, images())
            assert not ran

    def test_hook_runs(self) -> None:
        frozen = freeze(stock_of())
        seen: list[Tensor] = []
        frozen.conv2.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            output = frozen(images())
        assert len(seen) == 1 and torch.equal(output, seen[0] + images())

    def test_other_residuals_run_unpacked(self) -> None:
        """The same frozen block with a residual of another shape or dtype than at the call before."""

        class Net(Block):
            def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
                return self.conv2(F.relu(self.norm2(self.conv1(x)))) + residual

        stock = stock_of(Net).float()
        frozen, x = freeze(stock), images(dtype=torch.float32)
        with torch.no_grad():
            for residual in (x, x[:1], x.double(), x.to(memory_format=torch.channels_last), x[:, :, :1]):
                output, expected = frozen(x, residual), stock(x, residual)
                assert_near(output, expected, "output", 1e-5)
                assert output.stride() == expected.stride()

    def test_summary(self) -> None:
        frozen = freeze(nn.Sequential(stock_of(), stock_of()))
        summary = summarize(frozen)
        assert summary.norms == summary.norms_fused == 4
        assert "2 x conv-norm-ReLU, conv + addition" in str(summary)


@pytest.mark.parametrize("name", ["densenet121"])
@pytest.mark.full
def test_torchvision(name: str) -> None:
    stub_torchvision_operators()
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    stock = randomize_norms(getattr(models, name)(num_classes=5)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused, frozen, expected = (
        fuse(copy.deepcopy(stock)),
        freeze(copy.deepcopy(stock).eval()),
        copy.deepcopy(stock).eval(),
    )
    with record_stock_norms() as left, record_packed() as ran, torch.no_grad():
        copy.deepcopy(fused)(x)
        copy.deepcopy(fused).eval()(x)
        output = frozen(x)
        assert not left
        assert_near(output, expected(x), "output of the frozen model")
    assert ran.count((False, True)) == 59  # norms that follow a convolution; the others follow concatenations
    assert_models_match(fused, stock, x, steps=1)
