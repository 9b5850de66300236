"""Launchers of the max pooling kernels, ``kernels/max_pool.py``, with an optional batch norm and ReLU prologue."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res.backends.triton.kernels import max_pool as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import register_operator
from fused_res.backends.triton.tiles import accumulator_dtype
from fused_res.ops.memory_format import is_channels_last, pool_output_shape, to_dense_layout, to_memory_format

_BLOCK = 512


@register_operator
def max_pool_forward(
    input: Tensor, stats: Tensor | None, relu: bool, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    input = to_dense_layout(input)
    channels_last = is_channels_last(input)
    output = to_memory_format(input.new_empty(pool_output_shape(input, kernel_size, stride, padding)), channels_last)
    indices = torch.empty_like(output, dtype=torch.uint8)
    if output.numel():
        launch(
            kernels.max_pool_forward_kernel, (triton.cdiv(output.numel(), _BLOCK),),
            input, stats, output, indices, output.numel(), *input.shape[1:], *output.shape[2:],
            *kernel_size, *stride, *padding, relu, channels_last, input.numel() >= 2**31,
            accumulator_dtype(input.dtype), _BLOCK,
        )  # fmt: skip
    return output, indices


@register_operator
def max_pool_backward(
    grad_output: Tensor, indices: Tensor, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    input = to_dense_layout(input)
    channels_last = is_channels_last(input)
    grad_output, indices = to_memory_format(grad_output, channels_last), to_memory_format(indices, channels_last)
    grad_input = torch.empty_like(input)
    if grad_input.numel():
        launch(
            kernels.max_pool_backward_kernel, (triton.cdiv(input.numel(), _BLOCK),),
            grad_output, indices, grad_input, input.numel(), *input.shape[1:], *grad_output.shape[2:],
            *kernel_size, *stride, *padding, channels_last, input.numel() >= 2**31, accumulator_dtype(input.dtype),
            _BLOCK,
        )  # fmt: skip
    return grad_input
