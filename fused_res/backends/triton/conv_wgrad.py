"""Launcher of ``conv_wgrad``, the gradient of a 1x1 convolution's weight.

A split-K GEMM with M = output channels, N = input channels, K = pixels; its contract is in
:mod:`fused_res.ops.schemas`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res.backends.reference import conv_wgrad as reference
from fused_res.backends.triton.convolution import supports
from fused_res.backends.triton.gemm_config import input_precision, wgrad_config
from fused_res.backends.triton.kernels import conv1x1_backward as kernels
from fused_res.backends.triton.kernels.batch_norm_act import merge_sums_kernel
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import register_operator
from fused_res.ops.memory_format import to_memory_format

#: Elements of a tile of the merge, which is long where splits are few: 16 for each thread.
_MERGE_ELEMENTS = 2048


@register_operator
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
    if not supports(output, weight):
        return reference.conv_wgrad(
            grad_output, output, stats, relu_mask, relu, sums, count, weight, input, input_stats, input_relu, stride
        )
    output, grad_output, input = (
        to_memory_format(output, True),
        to_memory_format(grad_output, True),
        to_memory_format(input, True),
    )
    out_channels, channels = weight.shape[:2]
    pixels = output.numel() // out_channels
    config = wgrad_config(out_channels, channels, pixels, output.dtype)
    grad_weight = weight.new_empty(weight.shape)
    split_k = config.splits > 1
    partial_acc = stats.new_empty((config.splits, out_channels, channels), dtype=torch.float32) if split_k else None
    launch(
        kernels.wgrad_kernel, (config.tiles_m * config.tiles_n, config.splits),
        grad_output, output, stats, relu_mask, sums, input, input_stats, partial_acc if split_k else grad_weight,
        pixels, channels, out_channels, count, *input.shape[2:], *output.shape[2:], config.tiles_n,
        config.k_blocks_per_split * config.block_k, *stride, relu, input_relu,
        max(output.numel(), input.numel()) >= 2**31, input_precision(output.dtype), *config.block_shape,
        **config.options,
    )  # fmt: skip
    if split_k:
        block_parts = min(64, triton.next_power_of_2(config.splits))
        block_width = _MERGE_ELEMENTS // block_parts
        launch(
            merge_sums_kernel, (triton.cdiv(weight.numel(), block_width), 1),
            partial_acc, grad_weight, config.splits, config.splits, weight.numel(),
            BLOCK_PARTS=block_parts, BLOCK_WIDTH=block_width,
        )  # fmt: skip
    return grad_weight
