"""A convolution that normalises its input as it reads it, and takes its output's statistics from the accumulators."""

from __future__ import annotations

from torch import Tensor

from fused_res.backends.reference import conv_bn_stats as reference
from fused_res.backends.triton.batch_norm_sync import merge_parts
from fused_res.backends.triton.convolution import convolution, takes
from fused_res.backends.triton.registration import operator


@operator
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
    if not takes(input, weight):
        return reference.conv_bn_stats(
            input, weight, bias, input_stats, input_relu, stride, padding, dilation, groups, partials
        )
    output, of_tiles = convolution(
        input, weight, bias, None, input_stats, input_relu, stride, padding, dilation, groups, False, partials
    )
    return output, merge_parts(of_tiles) if partials else of_tiles.double()
