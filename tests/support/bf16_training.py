"""Residual blocks and networks in bfloat16 on the CPU: ours and stock PyTorch's, each compared with float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_res
from fused_res import _extension, functional
from fused_res.testing import stub_torchvision_operators

#: Of the modes, autocast has float32 master weights; in the other all parameters and buffers are bfloat16.
MODES = ("autocast", "bfloat16")

needs_bf16_products = pytest.mark.skipif(
    _extension.cpu_isa() not in ("avx512_bf16", "amx"), reason="needs products of bfloat16"
)

Tensors = dict[str, Tensor]


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Return the relative RMS error; the absolute one if the reference is zero."""
    error, scale = (actual.double() - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def images(*shape: int, seed: int = 1, mean: float = 0.0, channels_last: bool = True) -> Tensor:
    """Return float32 images with values of bfloat16, so that no rounding of the input is part of an error."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).bfloat16().float()
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def round_weights(model: Any) -> Any:
    """Round the weights of convolutions and linear layers to bfloat16 in place, and randomize the norms."""
    generator = torch.Generator().manual_seed(7)
    round_convolutions(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Multiples of 1/64 below 2, which bfloat16 represents.
                module.weight.copy_(torch.randint(32, 96, module.weight.shape, generator=generator) / 64)
                module.bias.copy_(torch.randint(-32, 32, module.bias.shape, generator=generator) / 64)
    return model


def round_convolutions(model: nn.Module) -> None:
    """Round the weights that autocast rounds, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters():
                    parameter.copy_(parameter.bfloat16())


def estimate_running_stats(model: nn.Module) -> None:
    """Set a block's running statistics to those of a batch, rounded to bfloat16."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images(8, 64, 9, 9, seed=50))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for buffer in norm.buffers():
            buffer.copy_(buffer.bfloat16())
        norm.num_batches_tracked.zero_()


def block(kind: str = "basic") -> Any:
    """Return torchvision's residual block of 32 to 64 channels, stock and in training mode."""
    stub_torchvision_operators()
    from torchvision.models.resnet import BasicBlock, Bottleneck

    torch.manual_seed(0)

    def projection(channels: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(64, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    built = {
        "basic": lambda: BasicBlock(64, 64),
        "basic, stride 2": lambda: BasicBlock(64, 48, 2, projection(48, 2)),
        "bottleneck": lambda: Bottleneck(64, 16),
        "bottleneck, projection": lambda: Bottleneck(64, 32, 1, projection(128, 1)),
    }[kind]()
    return round_weights(built).to(memory_format=torch.channels_last).train()


class Network(nn.Module):
    """A stem, three residual blocks and a classifier. Every convolution but the stem has a fused backward."""

    def __init__(self) -> None:
        super().__init__()
        stub_torchvision_operators()
        from torchvision.models.resnet import BasicBlock, Bottleneck

        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.first = BasicBlock(32, 32)
        down = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        self.second = BasicBlock(32, 64, 2, down)
        self.third = Bottleneck(64, 16)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.third(self.second(self.first(self.stem(x)))).mean((2, 3)))
        return output


def network(seed: int = 0) -> Any:
    """Return the stock network in training mode, with weights of bfloat16 values in float32."""
    torch.manual_seed(seed)
    return round_weights(Network()).to(memory_format=torch.channels_last).train()


def batch(size: int = 8, side: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images and labels."""
    labels = torch.randint(10, (size,), generator=torch.Generator().manual_seed(seed + 100))
    return images(size, 3, side, side, seed=seed), labels


def fused(model: nn.Module) -> Any:
    return fused_res.fuse(copy.deepcopy(model))


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype, enabled=enabled)


def loss_of(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    """Return the mean cross-entropy; ``dtype`` is that of autocast, None without autocast."""
    with autocast(dtype or torch.bfloat16, dtype is not None):
        y = model(x)
    return F.cross_entropy(y if y.dtype == torch.float64 else y.float(), labels)


def state_of(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradients_of(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers_of(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.named_buffers()}


def run(model: nn.Module, x: Tensor, mode: str | None, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Return output, gradients and buffers of a block's training step.

    Args:
        model: the block; its parameters are float32, float64 without a mode.
        x: the input, float32.
        mode: one of :data:`MODES`, or None for a float64 reference.
        dtype: dtype of the computation in a mode.
    """
    if mode is None:
        model, x = model.double(), x.double()
    else:
        x = x.to(dtype)  # like the output of the block before; stock adds a float32 identity in float32
        if mode == "bfloat16":
            model = model.to(dtype)
    x = x.detach().clone(memory_format=torch.preserve_format)
    x.requires_grad_()
    with autocast(dtype, mode == "autocast"):
        y = model(x)
    # Multiples of 1/64, which bfloat16 represents.
    grad = (torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).cos() * 64).round() / 64
    y.backward(grad.to(y.dtype))
    found = {"output": y.detach(), **gradients_of(model), **buffers_of(model)}
    return found if x.grad is None else {"input": x.grad, **found}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the values of all floating-point tensors, each scaled by 1 / sqrt(its number of elements)."""
    return torch.cat([t.double().flatten() / t.numel() ** 0.5 for t in tensors.values() if t.is_floating_point()])


def assert_error_at_most_stocks(
    ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], exact: Mapping[str, Tensor],
    factor: float = 1.2, floor: float = 1e-5,
) -> None:  # fmt: skip
    """Check the RMS errors against float64: each is at most `factor` times stock's plus `floor`.

    Counters, and NaN in the reference, must be equal.
    """
    assert list(ours) == list(stock) == list(exact)
    failures = []
    for name, reference in exact.items():
        assert ours[name].dtype == stock[name].dtype and ours[name].shape == stock[name].shape, name
        if not reference.is_floating_point():
            assert torch.equal(ours[name], reference), name
            continue
        error, limit = relative_error(ours[name], reference), relative_error(stock[name], reference)
        if not error <= factor * limit + floor:  # NaN fails, too
            failures.append(f"{name}: error {error:.3g}, stock {limit:.3g}")
    assert not failures, "; ".join(failures)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


def operators_of(model: nn.Module) -> list[str]:
    """Return the operators of the last plans of a model's fused blocks, forward and backward."""
    plans = {id(p): functional.last_plan[p] for p in model.parameters() if p in functional.last_plan}
    return [step.operator for plan in plans.values() for step in plan.steps]
