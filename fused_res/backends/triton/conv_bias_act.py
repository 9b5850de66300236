"""Launcher of ``act(conv(x, w) + bias [+ residual])``: one kernel, or two with split-K where output tiles are few."""

from __future__ import annotations

from torch import Tensor

from fused_res.backends.reference import conv_bias_act as reference
from fused_res.backends.triton.convolution import launch_convolution, supports
from fused_res.backends.triton.registration import register_operator
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format


@register_operator
def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    if not supports(input, weight):
        return reference.conv_bias_act(input, weight, bias, residual, stride, padding, dilation, groups, relu)
    y, _ = launch_convolution(
        input, weight, bias, residual, None, False, stride, padding, dilation, groups, relu, False
    )
    return to_memory_format(y, conv_output_is_channels_last(input, weight))
