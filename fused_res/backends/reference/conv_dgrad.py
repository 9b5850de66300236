"""Input gradient of a 1x1 convolution, the backward of the following norm as optional prologue, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import activation_backward, unpack_mask
from fused_res.backends.reference.batch_norm_sync import batch_norm_sums, norm_input_grad
from fused_res.ops import stats_dtype
from fused_res.ops.checks import relu_or_identity
from fused_res.ops.memory_format import to_memory_format


def conv_dgrad(
    grad_output: Tensor,
    output: Tensor | None,
    stats: Tensor | None,
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
    dz = grad_output
    if output is not None and stats is not None:
        activation = relu_or_identity(relu)
        dz = norm_input_grad(grad_output, output, stats, relu_mask, activation, sums, count).to(output.dtype)
    grad = torch.einsum("nk...,kc->nc...", dz, weight.flatten(1))
    if input is None or input_stats is None:
        if added is not None:
            grad = grad + (
                added if added_mask is None else added * unpack_mask(added_mask, to_memory_format(added, True))
            )
        return to_memory_format(grad, True), grad.new_empty(0, dtype=stats_dtype(grad.dtype))
    input_activation = relu_or_identity(input_relu)
    input_sums = batch_norm_sums(grad, input, input_stats, None, input_activation, None, None)
    grad = activation_backward(grad, input, input_stats, None, input_activation).to(dz.dtype)
    return to_memory_format(grad, True), input_sums
