"""Inference convolution ``act(conv(input, weight) + bias [+ residual])`` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import _torch_compat
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    dtype = stats_dtype(input.dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    no_output_padding = [0] * len(stride)
    y = torch.convolution(
        input.to(dtype), weight.to(dtype), wide_bias, stride, padding, dilation, False, no_output_padding, groups
    )
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    y = y.to(input.dtype)
    if _torch_compat.is_functorch_active():  # memory formats are not supported inside vmap
        return y
    return to_memory_format(y, conv_output_is_channels_last(input, weight))
