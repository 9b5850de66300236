"""``act(conv(x, w) + bias [+ residual])``, in one kernel, or two where few outputs need their sums split."""

from __future__ import annotations

from torch import Tensor

from fused_res.backends.reference import conv_bias_act as reference
from fused_res.backends.triton.convolution import convolution, takes
from fused_res.backends.triton.registration import operator
from fused_res.ops.memory_format import laid_out, makes_channels_last


@operator
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
    if not takes(input, weight):
        return reference.conv_bias_act(input, weight, bias, residual, stride, padding, dilation, groups, relu)
    y, _ = convolution(input, weight, bias, residual, None, False, stride, padding, dilation, groups, relu, False)
    return laid_out(y, makes_channels_last(input, weight))
