"""Gradient of a 1x1 convolution's weight, from the gradient behind the norm that follows it, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import activated
from fused_res.backends.reference.batch_norm_sync import before_norm


def conv_wgrad(
    grad_output: Tensor,
    output: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    weight: Tensor,
    input: Tensor,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: list[int],
) -> Tensor:
    dz = before_norm(grad_output, output, stats, relu_mask, relu, sums, count).to(output.dtype)
    every = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    x = activated(input[every], input_stats, input_relu)
    return torch.einsum("nk...,nc...->kc", dz, x).reshape(weight.shape)
