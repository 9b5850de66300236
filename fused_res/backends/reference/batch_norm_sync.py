"""The halves of a norm, between which several processes may add up what they found, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_res.backends.reference.batch_norm_act import channels_view, finish, masked, moments, reduced, stats_of, xhat
from fused_res.ops import SCALE


def batch_norm_partials(input: Tensor) -> Tensor:
    count = input.numel() // max(input.shape[1], 1)
    mean, var = moments(input.double(), None, None, True)
    return torch.stack((torch.full_like(mean, count), mean, var * count))[None]


def merge_partials(partials: Tensor) -> Tensor:
    """Chan, Golub & LeVeque (1979) for any number of parts at once; a part with a count of zero says nothing."""
    count, mean, m2 = partials.unbind(1)
    total = count.sum(0)
    merged = torch.where(count > 0, count * mean, 0).sum(0) / total.clamp(min=1)
    deviations = torch.where(count > 0, m2 + count * (mean - merged) ** 2, 0).sum(0)
    return torch.stack((total, merged, deviations))[None]


def merge_stats(partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool) -> Tensor:
    """``double``: whether ``stats`` are float64, too."""
    total, merged, deviations = merge_partials(partials)[0]
    dtype = torch.float64 if double else torch.float32
    var, unbiased = deviations / total.clamp(min=1), deviations / (total - 1).clamp(min=1)
    return stats_of(merged, var, unbiased, weight, bias, eps, dtype)


def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    residual_stats: Tensor | None,
) -> Tensor:
    dy = masked(grad_output, input, stats, relu_mask, relu)
    sums = [dy.sum(reduced(dy)), (dy * xhat(input, stats)).sum(reduced(dy))]
    if residual is not None and residual_stats is not None:
        sums.append((dy * xhat(residual, residual_stats)).sum(reduced(dy)))
    return torch.stack(sums)


def batch_norm_act_dx(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
) -> Tensor:
    return finish(before_norm(grad_output, input, stats, relu_mask, relu, sums, count), relu=False, like=input)


def before_norm(
    grad_output: Tensor,
    output: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
) -> Tensor:
    """The gradient of a norm's input, from the one behind it, in the statistics' dtype."""
    dz = masked(grad_output, output, stats, relu_mask, relu)
    if sums is not None:
        dz = dz - channels_view(sums[0] / count, dz) - xhat(output, stats) * channels_view(sums[1] / count, dz)
    return dz * channels_view(stats[SCALE], dz)
