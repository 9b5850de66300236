"""Gradient of a 1x1 convolution's weight; see :mod:`fused_res.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference import conv_wgrad as reference
from fused_res.backends.triton.batch_norm_sync import merge_sums
from fused_res.backends.triton.convolution import takes
from fused_res.backends.triton.kernels import pointwise_backward as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.products import precision, product
from fused_res.backends.triton.registration import operator
from fused_res.ops.memory_format import laid_out


@operator
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
    if not takes(output, weight):
        return reference.conv_wgrad(
            grad_output, output, stats, relu_mask, relu, sums, count, weight, input, input_stats, input_relu, stride
        )
    output, grad_output, input = laid_out(output, True), laid_out(grad_output, True), laid_out(input, True)
    out_channels, channels = weight.shape[:2]
    rows = output.numel() // out_channels
    cut = product(out_channels, channels, rows, 1, output.dtype, formed=True)
    partials = stats.new_empty((cut.splits, out_channels, channels), dtype=torch.float32)
    launch(
        kernels.wgrad_kernel, (cut.row_tiles * cut.col_tiles, cut.splits),
        grad_output, output, stats, relu_mask, sums, input, input_stats, partials,
        rows, channels, out_channels, count, *input.shape[2:], *output.shape[2:], cut.col_tiles,
        cut.chunks_per_split * cut.block_k, *stride, relu, input_relu,
        max(output.numel(), input.numel()) >= 2**31, precision(output.dtype), *cut.blocks, **cut.options,
    )  # fmt: skip
    return merge_sums(partials).to(weight.dtype).view_as(weight)
