"""Convolutions, norms and blocks of the tests of training on the CPU, with references in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res import BlockSpec
from fused_res.functional import residual_block


def images(*shape: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) + mean).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """A convolution. Its name lists what is special about it."""

    name: str
    input: tuple[int, int, int, int]
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return [self.stride] * 2, [self.padding] * 2, [self.dilation] * 2

    @property
    def compact(self) -> bool:
        return self.kernel == 1 and self.stride > 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input, a float32 weight and the gradient of the output."""
        x = images(*self.input).to(self.dtype)
        weight = torch.randn(self.outputs, self.input[1], self.kernel, self.kernel)
        weight = (weight / weight[0].numel() ** 0.5).contiguous(memory_format=torch.channels_last)
        z = F.conv2d(x[:1].float(), weight, None, self.stride, self.padding, self.dilation)
        return x, weight, images(self.input[0], self.outputs, *z.shape[2:]).to(self.dtype)

    def gradients(self, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of input and weight in float64; that of the input is compact where ours is."""
        sizes = (*self.geometry, False, [0, 0], 1, [True, True, False])
        exact = weight.to(self.dtype).double()
        dx, dweight, _ = torch.ops.aten.convolution_backward(dz.double(), x.double(), exact, None, *sizes)
        return dx[:, :, :: self.stride, :: self.stride] if self.compact else dx, dweight


def norm_stats(z: Tensor) -> Tensor:
    """Return ``stats`` (5, C) of a norm with random parameters."""
    wide = z.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    invstd = (var + 1e-5).rsqrt()
    scale = (torch.rand(z.shape[1]) + 0.5) * invstd
    return torch.stack((mean, invstd, scale, torch.randn(z.shape[1]) * 0.1, var)).float()


def run_block(spec: BlockSpec, x: Tensor, tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Return the block's output and the gradients of the input and of all parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    flat = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors]
    parameters = [t.requires_grad_() for i, t in enumerate(flat) if t is not None and i % 6 < 4]
    y = residual_block(x, spec, flat, **{"training": True, **options})
    grad = torch.linspace(-1, 2, y.numel()).view(y.shape).cos().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]
