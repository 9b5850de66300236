"""Gradient of a 1x1 convolution's input; see :mod:`fused_res.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference import conv_dgrad as reference
from fused_res.backends.triton.batch_norm_sync import merge_sums
from fused_res.backends.triton.convolution import takes
from fused_res.backends.triton.kernels import pointwise_backward as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.products import precision, product
from fused_res.backends.triton.registration import operator
from fused_res.ops.memory_format import laid_out


@operator
def conv_dgrad(
    grad_output: Tensor,
    output: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    weight: Tensor,
    input: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    added: Tensor | None = None,
    added_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not takes(output, weight):
        norm = grad_output, output, stats, relu_mask, relu, sums, count
        return reference.conv_dgrad(*norm, weight, input, input_stats, input_relu, added, added_mask)
    output, grad_output = laid_out(output, True), laid_out(grad_output, True)
    out_channels, channels = weight.shape[:2]
    N, _, P, Q = output.shape
    rows = N * P * Q
    grad_input = torch.empty(
        (N, channels, P, Q), dtype=output.dtype, device=output.device, memory_format=torch.channels_last
    )
    cut = product(rows, channels, out_channels, 1, output.dtype, formed=True)
    through_norm = input is not None and input_stats is not None
    x = laid_out(input, True) if through_norm else None  # type: ignore[arg-type]
    partials = stats.new_empty((cut.row_tiles, 2, channels) if through_norm else (0,))
    launch(
        kernels.dgrad_kernel, (cut.row_tiles * cut.col_tiles,),
        grad_output, output, stats, relu_mask, sums, weight.flatten(1), grad_input, x,
        input_stats if through_norm else None, partials if through_norm else None,
        None if added is None else laid_out(added, True), added_mask,
        rows, channels, out_channels, count, cut.col_tiles,
        relu, input_relu, max(output.numel(), grad_input.numel()) >= 2**31, precision(output.dtype),
        *cut.blocks, **cut.options,
    )  # fmt: skip
    return grad_input, merge_sums(partials) if through_norm else partials
