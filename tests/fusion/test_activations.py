"""Norms with activations other than ReLU: results, gradients and state equal stock PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import freeze, fuse, summarize
from tests.support.model_comparison import (
    assert_models_match,
    assert_near,
    randomize_norms,
    record_fused_calls,
    record_stock_norms,
)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class LeakyInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(x, 0.2)


#: Activations that the fused norm computes.
FUSED: dict[str, Callable[[], nn.Module]] = {
    "ReLU6": nn.ReLU6, "ReLU6 in place": lambda: nn.ReLU6(inplace=True), "Hardtanh": lambda: nn.Hardtanh(0.0, 6.0),
    "LeakyReLU": nn.LeakyReLU, "LeakyReLU(0.3)": lambda: nn.LeakyReLU(0.3, inplace=True), "leaky_relu_": LeakyInPlace,
    "SiLU": nn.SiLU, "SiLU in place": lambda: nn.SiLU(inplace=True), "x * sigmoid(x)": Swish,
}  # fmt: skip
#: Others run after the fused norm.
SEPARATE: dict[str, Callable[[], nn.Module]] = {
    "Hardswish": nn.Hardswish, "PReLU": nn.PReLU, "GELU": nn.GELU, "ELU": nn.ELU, "Mish": nn.Mish,
}  # fmt: skip


class Network(nn.Module):
    """Activations inside and at the end of chains, before and after an addition, and before a pooling."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation(), nn.MaxPool2d(2))
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), activation())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, 1, 12, False), nn.BatchNorm2d(12), activation())
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.act, self.norm, self.head = activation(), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.act(self.norm(self.act(x))))


def network(activation: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomize_norms(Network(activation)).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data *= 4  # values on both sides of 6
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 18, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*FUSED, *SEPARATE])
def test_training(name: str) -> None:
    stock = network((FUSED | SEPARATE)[name])
    fused = fuse(copy.deepcopy(stock))
    with record_fused_calls() as calls, record_stock_norms() as left:
        fused(images())
    assert left == []
    if name in FUSED:  # the stem; the block; the last norm
        assert calls == ["residual_block", "residual_block", "batch_norm_act"]
    fused.load_state_dict(stock.state_dict())
    assert_models_match(fused, stock, images().requires_grad_())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [*FUSED, *SEPARATE])
@torch.no_grad()
def test_inference(name: str, layout: torch.memory_format) -> None:
    stock = network((FUSED | SEPARATE)[name]).eval()
    x = images().to(memory_format=layout)
    before, expected = x.clone(), stock(x)
    for model in (fuse(copy.deepcopy(stock)), freeze(stock), fuse(copy.deepcopy(stock), cache_eval=True)):
        with record_stock_norms() as left:
            actual = model(x)
        assert left == []
        assert_near(actual, expected, "output")
        assert actual.stride() == expected.stride()
        assert torch.equal(x, before)


@torch.no_grad()
def test_clamp_to_6_is_folded() -> None:
    class Clamp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 6)

    stock = network(Clamp).eval()
    frozen = freeze(stock)
    with record_stock_norms() as left:
        actual = frozen(images())
    assert left == []
    assert_near(actual, stock(images()), "output")


@pytest.mark.parametrize(
    ("activation", "change"),
    [
        (nn.LeakyReLU, lambda act: setattr(act, "negative_slope", 0.4)),
        (nn.ReLU6, lambda act: setattr(act, "max_val", 2.0)),
        (nn.Hardtanh, lambda act: setattr(act, "min_val", -0.5)),
        (nn.SiLU, lambda act: act.register_forward_hook(lambda module, args, output: output + 1)),
    ],
)
def test_settings_may_change(activation: Any, change: Callable[[Any], None]) -> None:
    stock = network(lambda: activation(0.0, 6.0) if activation is nn.Hardtanh else activation()).eval()
    fused, frozen = fuse(copy.deepcopy(stock)), freeze(stock)
    with torch.no_grad():
        frozen(images())
        for model in (stock, fused, frozen):
            change(model.expand[2])
        expected = stock(images())
        assert_near(fused(images()), expected, "fused")
        assert_near(frozen(images()), expected, "frozen")


@pytest.mark.parametrize("name", SEPARATE)
def test_summary_names_the_separate_activations_once(name: str) -> None:
    summary = summarize(fuse(network(SEPARATE[name])))
    assert summary.notes == (
        f"activation {name} runs separately after the fused addition",
        f"activation {name} runs separately after the fused norm",
    )
    assert str(summary).endswith("\n".join(["5 of 5 norms run fused", *summary.notes]))
    assert "separately" not in str(summarize(fuse(network(nn.ReLU))))
    assert "norm-ReLU6" in str(summarize(fuse(network(nn.ReLU6))))
