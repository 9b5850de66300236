"""Weight gradient of a 1x1 convolution, with the backward of the following norm as prologue, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import apply_prologue
from fused_res.backends.reference.batch_norm_sync import norm_input_grad
from fused_res.ops.checks import relu_or_identity


def conv_wgrad(
    grad_output: Tensor,
    output: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    weight: Tensor,
    input: Tensor,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: list[int],
) -> Tensor:
    activation = relu_or_identity(relu)
    dz = norm_input_grad(grad_output, output, stats, relu_mask, activation, sums, count).to(output.dtype)
    strided = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    x = apply_prologue(input[strided], input_stats, input_relu)
    return torch.einsum("nk...,nc...->kc", dz, x).reshape(weight.shape)
