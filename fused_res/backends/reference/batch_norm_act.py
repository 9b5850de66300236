"""``act(bn(x) [+ residual])`` in plain PyTorch.

First :func:`batch_norm_act`, which *is* the definition and which autograd can differentiate as often as it likes; then
the operators of :mod:`fused_res.ops` written out, with the backward of Ioffe & Szegedy (2015), section 3::

    dy'  = dy where !(y <= 0), else 0
    db   = sum dy'        dw = sum dy' * xhat        xhat = (x - mean) * invstd
    dx   = weight * invstd * (dy' - db/M - xhat * dw/M)      with M values a channel, and batch statistics
    dx   = weight * invstd * dy'                             with running statistics

A residual that is normalised, too, has the same gradients of the same ``dy'``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res.ops import INVSTD, MEAN, SCALE, SHIFT, VAR, stats_dtype
from fused_res.ops.memory_format import is_channels_last


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    relu: bool = True,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: returns the output and, detached, the mean and variance that running statistics take in."""
    mean, var = moments(input, running_mean, running_var, training)
    kept_var = unbiased(var, input) if training else var
    x = input.to(mean.dtype)
    y = (x - channels_view(mean, x)) * channels_view(torch.rsqrt(var + eps), x)
    if weight is not None:
        y = y * channels_view(weight.to(x.dtype), x)
    if bias is not None:
        y = y + channels_view(bias.to(x.dtype), x)
    if residual is not None:
        r = residual.to(x.dtype)
        if residual_scale is not None and residual_shift is not None:
            r = r * channels_view(residual_scale.to(x.dtype), x) + channels_view(residual_shift.to(x.dtype), x)
        y = y + r
    if relu:
        y = torch.relu(y)
    return y.to(input.dtype), mean.detach(), kept_var.detach()


def moments(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance a channel, ``(C,)`` each: of the batch if ``training``, else the running ones."""
    dtype = stats_dtype(input.dtype)
    if not training:
        assert running_mean is not None and running_var is not None
        return running_mean.to(dtype), running_var.to(dtype)
    # As in PyTorch, an empty batch has no statistics; zeros keep NaN out of the gradients.
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
        return zeros, zeros
    x = input.to(dtype)
    var, mean = torch.var_mean(x, reduced(x), correction=0)
    return mean, var


def unbiased(var: Tensor, input: Tensor) -> Tensor:
    """The variance with Bessel's correction, as running statistics keep it."""
    count = input.numel() // input.shape[1]
    return var * (count / (count - 1)) if count > 1 else var


def batch_norm_stats(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    mean, var = moments(input.double(), running_mean, running_var, training)
    kept_var = unbiased(var, input) if training else var
    return stats_of(mean, var, kept_var, weight, bias, eps, stats_dtype(input.dtype))


def stats_of(
    mean: Tensor,
    var: Tensor,
    kept_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``stats`` as :mod:`fused_res.ops` has them; ``kept_var`` is what running statistics take in."""
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight * invstd
    # What is lost when mean is rounded would come back in every element, times scale: the shift makes up for it.
    shift = (mean.to(dtype) - mean) * scale
    if bias is not None:
        shift = shift + bias
    return torch.stack([row.to(dtype) for row in (mean, invstd, scale, shift, kept_var)])


def batch_norm_act_forward(
    input: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    output, mask = batch_norm_act_apply(input, stats, residual, residual_stats, relu, save_mask)
    return output, stats, mask


def batch_norm_act_apply(
    input: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    y = normalise(input, stats)
    if residual is not None:
        y = y + (residual if residual_stats is None else normalise(residual, residual_stats))
    mask = pack_mask(~(y <= 0), input) if save_mask else input.new_empty(0, dtype=torch.uint8)
    return finish(y, relu, like=input), mask


def batch_norm_act_inference_(
    input: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
) -> None:
    stats = batch_norm_stats(input, weight, bias, running_mean, running_var, False, eps)
    input.copy_(batch_norm_act_apply(input, stats, residual, residual_stats, relu, False)[0])


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = masked(grad_output, input, stats, relu_mask, relu)
    want_input, want_residual, *want_weight_bias = output_mask
    grad_residual = finish(dy, relu=False, like=input) if want_residual else input.new_empty(0)
    grad_input, *rest = _norm_backward(dy, input, weight, stats, training, [want_input, *want_weight_bias])
    return grad_input, grad_residual, rest[0], rest[1]


def batch_norm_act_backward_pair(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    residual: Tensor,
    residual_weight: Tensor | None,
    residual_stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    residual_training: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = masked(grad_output, input, stats, relu_mask, False)
    want_input, want_residual, *rest = output_mask
    grad_input, *grads = _norm_backward(dy, input, weight, stats, training, [want_input, *rest[:2]])
    grad_residual, *residual_grads = _norm_backward(
        dy, residual, residual_weight, residual_stats, residual_training, [want_residual, *rest[2:]]
    )
    return grad_input, grad_residual, grads[0], grads[1], residual_grads[0], residual_grads[1]


def _norm_backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, each where wanted, of the masked ``dy``."""
    normalised = xhat(input, stats)
    dbias = dy.sum(reduced(dy))
    dweight = (dy * normalised).sum(reduced(dy))
    empty = input.new_empty(0)
    grad_input, grad_weight, grad_bias = empty, empty, empty
    if wanted[0]:
        dx = dy
        if training and dy.numel():
            count = dy.numel() // dy.shape[1]
            dx = dy - channels_view(dbias / count, dy) - normalised * channels_view(dweight / count, dy)
        grad_input = finish(dx * channels_view(stats[SCALE], dy), relu=False, like=input)
    if wanted[1]:
        grad_weight = dweight if weight is None else dweight.to(weight.dtype)
    if wanted[2]:
        grad_bias = dbias if weight is None else dbias.to(weight.dtype)
    return grad_input, grad_weight, grad_bias


def add_masked_(self: Tensor, grad: Tensor, relu_mask: Tensor | None) -> None:
    self.add_(grad if relu_mask is None else grad * unpack_mask(relu_mask, grad))


def update_running_stats(
    running_mean: list[Tensor], running_var: list[Tensor], stats: list[Tensor], momentum: list[float]
) -> None:
    for mean, var, batch, weight in zip(running_mean, running_var, stats, momentum, strict=True):
        for running, new in ((mean, batch[MEAN]), (var, batch[VAR])):
            running.copy_((1 - weight) * running.to(new.dtype) + weight * new)


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_mask(mask: Tensor, like: Tensor | None = None) -> Tensor:
    """Packs a boolean tensor to bits, in the order for ``like`` or itself; the layout is in :mod:`fused_res.ops`."""
    rows = _rows(mask, is_channels_last(mask if like is None else like))
    bytes = F.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bytes * bytes.new_tensor(_BITS)).sum(2, dtype=torch.uint8)


def unpack_mask(relu_mask: Tensor, like: Tensor) -> Tensor:
    """The boolean tensor, of the shape and memory format of ``like``, that :func:`pack_mask` packed."""
    channels_last = is_channels_last(like)
    columns = like.shape[1] if channels_last else math.prod(like.shape[2:])
    bits = (relu_mask.unsqueeze(2) & relu_mask.new_tensor(_BITS)).ne(0).flatten(1)[:, :columns]
    if channels_last:
        return bits.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return bits.reshape(like.shape)


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * x.shape[1], math.prod(x.shape[2:]))


def normalise(input: Tensor, stats: Tensor) -> Tensor:
    centred = input.to(stats.dtype) - channels_view(stats[MEAN], input)
    return torch.addcmul(channels_view(stats[SHIFT], input), centred, channels_view(stats[SCALE], input))


def xhat(input: Tensor, stats: Tensor) -> Tensor:
    return (input.to(stats.dtype) - channels_view(stats[MEAN], input)) * channels_view(stats[INVSTD], input)


def masked(grad: Tensor, output: Tensor, stats: Tensor, relu_mask: Tensor | None, relu: bool) -> Tensor:
    """The gradient in front of the ReLU, in the statistics' dtype."""
    dy = grad.to(stats.dtype)
    if relu_mask is not None:
        return dy * unpack_mask(relu_mask, output)
    return torch.where(normalise(output, stats) <= 0, 0, dy) if relu else dy


def activated(input: Tensor, stats: Tensor | None, relu: bool) -> Tensor:
    """``input``, or with ``stats`` the activation of it, rounded to its dtype."""
    return input if stats is None else finish(normalise(input, stats), relu, like=input)


def finish(y: Tensor, relu: bool, like: Tensor) -> Tensor:
    y = torch.relu(y) if relu else y
    return torch.empty_like(like).copy_(y)


def channels_view(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.view(-1, *(1,) * (like.dim() - 2))


def reduced(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
