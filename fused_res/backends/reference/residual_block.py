"""A residual block (He et al. 2015, https://arxiv.org/abs/1512.03385) in plain PyTorch.

It is the definition of a block, and its implementation under ``torch.func`` transforms and forward-mode
differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res.backends.reference.batch_norm_act import batch_norm_act
from fused_res.spec import BlockSpec, group_by_unit


def residual_block(
    input: Tensor, spec: BlockSpec, tensors: Sequence[Tensor | None], training: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the block's output, and for each unit the mean and the variance that update its running statistics.

    A unit is a convolution, a norm and an activation; the projection is the last one.

    Args:
        input: ``(N, C, ...)``.
        spec: structure of the block.
        tensors: six tensors per unit: weight, bias, norm weight and bias, running mean and variance.
        training: for each unit, whether its norm uses the statistics of the batch.
    """
    units = group_by_unit(tensors)
    unit_moments: dict[int, tuple[Tensor, Tensor]] = {}

    def unit(index: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        unit_spec = spec.convolutions[index]
        weight, bias, norm_weight, norm_bias, running_mean, running_var = units[index]
        no_output_padding = [0] * len(unit_spec.stride)
        z = torch.ops.aten.convolution.default(
            x,
            weight.to(x.dtype),
            bias,
            unit_spec.stride,
            unit_spec.padding,
            unit_spec.dilation,
            False,
            no_output_padding,
            unit_spec.groups,
        )
        y, *moments = batch_norm_act(
            z,
            running_mean,
            running_var,
            norm_weight,
            norm_bias,
            residual,
            training[index],
            unit_spec.eps,
            unit_spec.activation,
            negative_slope=unit_spec.negative_slope,
        )
        unit_moments[index] = moments[0], moments[1]
        return y

    last = len(spec.units) - 1
    y = input
    for index in range(last):
        y = unit(index, y)
    residual = input if spec.shortcut == "identity" else None
    if spec.projection is not None:
        residual = unit(last + 1, input)
    y = unit(last, y, residual)
    if spec.pool is not None:
        y = F.max_pool2d(y, spec.pool.kernel_size, spec.pool.stride, spec.pool.padding)
    ordered = [unit_moments[index] for index in sorted(unit_moments)]
    return y, [mean for mean, _ in ordered], [var for _, var in ordered]
