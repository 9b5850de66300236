"""A whole block in plain PyTorch, differentiable as often as one likes: the definition, and the double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res.backends.reference.batch_norm_act import batch_norm_act
from fused_res.spec import BlockSpec, by_unit


def residual_block(
    input: Tensor, spec: BlockSpec, tensors: Sequence[Tensor | None], training: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the output and, for each unit (the projection last), the mean and the biased variance in use."""
    units = by_unit(tensors)
    used: dict[int, tuple[Tensor, Tensor]] = {}

    def unit(index: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        this = spec.convolutions[index]
        weight, bias, norm_weight, norm_bias, running_mean, running_var = units[index]
        no_output_padding = [0] * len(this.stride)
        z = torch.ops.aten.convolution.default(
            x, weight, bias, this.stride, this.padding, this.dilation, False, no_output_padding, this.groups
        )
        y, *moments = batch_norm_act(
            z, running_mean, running_var, norm_weight, norm_bias, residual, training[index], this.eps, this.relu
        )
        used[index] = moments[0], moments[1]
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
    return y, [used[index][0] for index in sorted(used)], [used[index][1] for index in sorted(used)]
