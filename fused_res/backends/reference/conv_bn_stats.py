"""Convolution with a norm-ReLU prologue that also returns partial statistics of its output, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import apply_prologue
from fused_res.backends.reference.batch_norm_sync import batch_norm_partials


def conv_bn_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    partials: bool,
) -> tuple[Tensor, Tensor]:
    x = apply_prologue(input, input_stats, input_relu)
    output = torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return output, batch_norm_partials(output) if partials else output.new_empty(0, dtype=torch.float64)
