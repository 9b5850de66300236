"""Launcher of ``conv_bn_stats``: forward convolution with a batch norm and ReLU prologue on its input operand, and the
partial statistics of its output, computed from the accumulators."""

from __future__ import annotations

from torch import Tensor

from fused_res.backends.reference import conv_bn_stats as reference
from fused_res.backends.triton.batch_norm_sync import merge_partial_stats
from fused_res.backends.triton.convolution import launch_convolution, supports
from fused_res.backends.triton.registration import register_operator


@register_operator
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
    if not supports(input, weight):
        return reference.conv_bn_stats(
            input, weight, bias, input_stats, input_relu, stride, padding, dilation, groups, partials
        )
    output, partials_per_tile = launch_convolution(
        input, weight, bias, None, input_stats, input_relu, stride, padding, dilation, groups, False, partials
    )
    return output, merge_partial_stats(partials_per_tile) if partials else partials_per_tile.double()
