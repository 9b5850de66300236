"""The reduction and elementwise passes of a batch norm as separate operators, in plain PyTorch.

A process group reduces statistics and gradient sums over its ranks between the two passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import (
    activation_backward,
    build_stats,
    cast,
    channels_view,
    moments,
    reduction_dims,
    xhat,
)
from fused_res.ops import SCALE
from fused_res.ops.checks import RELU_OR_IDENTITY, check_activation


def batch_norm_partials(input: Tensor) -> Tensor:
    count = input.numel() // max(input.shape[1], 1)
    mean, var = moments(input.double(), None, None, True)
    return torch.stack((torch.full_like(mean, count), mean, var * count))[None]


def merge_partials(partials: Tensor) -> Tensor:
    """Merge partial statistics ``(P, 3, C)``, rows count, mean and M2, into ``(1, 3, C)``.

    This is the multi-way form of the formula of Chan, Golub & LeVeque 1979. Parts with a count of zero are ignored.
    """
    count, mean, m2 = partials.unbind(1)
    total = count.sum(0)
    merged_mean = torch.where(count > 0, count * mean, 0).sum(0) / total.clamp(min=1)
    merged_m2 = torch.where(count > 0, m2 + count * (mean - merged_mean) ** 2, 0).sum(0)
    return torch.stack((total, merged_mean, merged_m2))[None]


def merge_stats(partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool) -> Tensor:
    """Merge partial statistics ``(P, 3, C)`` and return ``stats`` ``(5, C)``, float64 if ``double``, else float32."""
    total, mean, m2 = merge_partials(partials)[0]
    dtype = torch.float64 if double else torch.float32
    var, unbiased = m2 / total.clamp(min=1), m2 / (total - 1).clamp(min=1)
    return build_stats(mean, var, unbiased, weight, bias, eps, dtype)


def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    negative_slope: float = 0.01,
) -> Tensor:
    dy = activation_backward(grad_output, input, stats, relu_mask, activation, negative_slope)
    if residual is not None:
        check_activation(activation, RELU_OR_IDENTITY, " with a residual")
    sums = [dy.sum(reduction_dims(dy)), (dy * xhat(input, stats)).sum(reduction_dims(dy))]
    if residual is not None and residual_stats is not None:
        sums.append((dy * xhat(residual, residual_stats)).sum(reduction_dims(dy)))
    return torch.stack(sums)


def batch_norm_act_dx(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    sums: Tensor | None,
    count: int,
    negative_slope: float = 0.01,
) -> Tensor:
    dx = norm_input_grad(grad_output, input, stats, relu_mask, activation, sums, count, negative_slope)
    return cast(dx, like=input)


def norm_input_grad(
    grad_output: Tensor,
    norm_input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    sums: Tensor | None,
    count: int,
    negative_slope: float = 0.01,
) -> Tensor:
    """Return the gradient with respect to a norm's input, in the dtype of ``stats``.

    Args:
        grad_output: gradient with respect to the output of norm and activation.
        norm_input: input of the norm (a convolution's output).
        stats: statistics of the norm.
        relu_mask, activation, negative_slope: as of :func:`activation_backward`.
        sums: backward reductions ``(2, C)`` over all ranks, ``sum dy`` and ``sum dy * xhat``; None if the norm used
            running statistics.
        count: number of values per channel over all ranks.
    """
    dz = activation_backward(grad_output, norm_input, stats, relu_mask, activation, negative_slope)
    if sums is not None:
        dz = dz - channels_view(sums[0] / count, dz) - xhat(norm_input, stats) * channels_view(sums[1] / count, dz)
    return dz * channels_view(stats[SCALE], dz)
