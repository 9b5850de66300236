"""The operator ``conv_bn_stats``: a convolution that also returns the partial statistics of its output.

A fused algorithm (``fused_bf16``, ``fused_fp32``) normalizes chunks of the input that stay in L2, in its operand
prologue. With other algorithms a separate pass normalizes the input first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends import registry
from fused_res.backends.cpu import convolution
from fused_res.backends.cpu.operators import OPERATORS
from fused_res.ops.checks import relu_or_identity


def _conv_bn_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    partials: bool,
) -> tuple[Tensor, Tensor]:
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    _, selected = registry.select("cpu", "forward", input, weight, geometry, "fused", False)
    if selected.algorithm in (convolution.FUSED_BF16, convolution.FUSED_FP32):
        return convolution.normalize_and_convolve(input, weight, bias, input_stats, input_relu, geometry, partials)
    x = input
    if input_stats is not None:
        x, _ = OPERATORS["batch_norm_act_apply"](input, input_stats, None, None, relu_or_identity(input_relu), False)
    forward = selected.algorithm.implementations["forward"]
    assert callable(forward)
    output, partial_stats = forward(x, weight, bias, geometry, partials)
    if not partials:
        return output, output.new_empty(0, dtype=torch.float64)
    return output, OPERATORS["batch_norm_partials"](output) if partial_stats is None else partial_stats


conv_bn_stats = ops.register_python_operator("fused_res_cpu", "conv_bn_stats", _conv_bn_stats, "CPU")
