"""``conv_bn_stats`` as an operator: the selected algorithm, after a pass that normalises its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import ops
from fused_res.backends import registry
from fused_res.backends.cpu.operators import OPERATORS


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
    x = input
    if input_stats is not None:
        x, _ = OPERATORS["batch_norm_act_apply"](input, input_stats, None, None, input_relu, False)
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    _, selected = registry.select("cpu", "forward", x, weight, geometry, "planned", False)
    forward = selected.algorithm.serves["forward"]
    assert callable(forward)
    output, made = forward(x, weight, bias, geometry, partials)
    if not partials:
        return output, output.new_empty(0, dtype=torch.float64)
    return output, OPERATORS["batch_norm_partials"](output) if made is None else made


conv_bn_stats = ops.operator("fused_res_cpu", "conv_bn_stats", _conv_bn_stats, "CPU")
