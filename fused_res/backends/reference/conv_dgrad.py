"""Gradient of a 1x1 convolution's input, from the gradient behind the norm that follows it, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import masked, unpack_mask
from fused_res.backends.reference.batch_norm_sync import batch_norm_sums, before_norm
from fused_res.ops.memory_format import laid_out


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
    dz = before_norm(grad_output, output, stats, relu_mask, relu, sums, count).to(output.dtype)
    grad = torch.einsum("nk...,kc->nc...", dz, weight.flatten(1))
    if input is None or input_stats is None:
        if added is not None:
            grad = grad + (added if added_mask is None else added * unpack_mask(added_mask, laid_out(added, True)))
        return laid_out(grad, True), stats.new_empty(0)
    sums = batch_norm_sums(grad, input, input_stats, None, input_relu, None, None)
    grad = masked(grad, input, input_stats, None, input_relu).to(output.dtype)
    return laid_out(grad, True), sums
