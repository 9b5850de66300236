"""Batch norm with residual addition and activation, ``act(bn(x) [+ residual])``, in plain PyTorch.

:func:`batch_norm_act` is the definition, which autograd can differentiate any number of times. The operators of family
``batch_norm_act`` (:mod:`fused_res.ops.schemas`) follow, with the backward of Ioffe & Szegedy 2015
(https://arxiv.org/abs/1502.03167), section 3::

    dy'  = dy * act'(z)      z = norm(x); of a ReLU also from a saved mask of z + residual
    db   = sum dy'        dw = sum dy' * xhat        xhat = (x - mean) * invstd
    dx   = weight * invstd * (dy' - db/M - xhat * dw/M)      with batch statistics of M values per channel
    dx   = weight * invstd * dy'                             with running statistics

A residual with a batch norm of its own has the same formulas, with the same ``dy'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_res import _torch_compat
from fused_res.ops import INVSTD, MEAN, SCALE, SHIFT, VAR, stats_dtype
from fused_res.ops.checks import RELU_OR_IDENTITY, check_activation, relu_or_identity
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
    activation: str = "relu",
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and, detached, the mean and variance ``(C,)`` that update the running statistics.

    The variance is unbiased if ``training``. ``residual_scale`` and ``residual_shift`` ``(C,)`` transform the residual
    before the addition; other arguments are as of :func:`fused_res.functional.batch_norm_act`.
    """
    mean, var = moments(input, running_mean, running_var, training)
    var_for_update = unbiased_var(var, input) if training else var
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
    return activate(y, activation, negative_slope).to(input.dtype), mean.detach(), var_for_update.detach()


def moments(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel, ``(C,)``: of the batch if ``training``, else the running ones."""
    dtype = stats_dtype(input.dtype)
    if not training:
        assert running_mean is not None and running_var is not None
        return running_mean.to(dtype), running_var.to(dtype)
    # As in PyTorch, an empty batch has no statistics; zeros avoid NaN in the gradients.
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
        return zeros, zeros
    x = input.to(dtype)
    var, mean = torch.var_mean(x, reduction_dims(x), correction=0)
    return mean, var


def unbiased_var(var: Tensor, input: Tensor) -> Tensor:
    """Return the variance with Bessel's correction, which updates the running variance."""
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
    var_for_update = unbiased_var(var, input) if training else var
    return build_stats(mean, var, var_for_update, weight, bias, eps, stats_dtype(input.dtype))


def build_stats(
    mean: Tensor,
    var: Tensor,
    var_for_update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``stats`` ``(5, C)`` in the layout of :mod:`fused_res.ops.schemas`.

    Args:
        mean, var: mean and biased variance ``(C,)``, for the normalization.
        var_for_update: variance ``(C,)`` that updates the running variance.
        weight, bias: ``(C,)`` or None.
        eps: added to ``var``.
        dtype: dtype of the result.
    """
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight * invstd
    # The rounding error of the mean would appear in every element, multiplied by scale; the shift compensates for it.
    shift = (mean.to(dtype) - mean) * scale
    if bias is not None:
        shift = shift + bias
    return torch.stack([row.to(dtype) for row in (mean, invstd, scale, shift, var_for_update)])


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
    activation: str,
    save_mask: bool,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    output, mask = batch_norm_act_apply(input, stats, residual, residual_stats, activation, save_mask, negative_slope)
    return output, stats, mask


def batch_norm_act_apply(
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    activation: str,
    save_mask: bool,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    if residual is not None or save_mask:
        check_activation(activation, RELU_OR_IDENTITY, " with a residual or a ReLU mask")
    y = normalize(input, stats)
    if residual is not None:
        y = y + (residual if residual_stats is None else normalize(residual, residual_stats))
    mask = pack_mask(~(y <= 0), input) if save_mask else input.new_empty(0, dtype=torch.uint8)
    return cast(activate(y, activation, negative_slope), like=input), mask


def batch_norm_act_inference_(
    input: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    negative_slope: float = 0.01,
) -> None:
    stats = batch_norm_stats(input, weight, bias, running_mean, running_var, False, eps)
    input.copy_(batch_norm_act_apply(input, stats, residual, residual_stats, activation, False, negative_slope)[0])


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    activation: str,
    output_mask: list[bool],
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = activation_backward(grad_output, input, stats, relu_mask, activation, negative_slope)
    needs_input, needs_residual, *needs_weight_bias = output_mask
    grad_residual = cast(dy, like=input) if needs_residual else input.new_empty(0)
    grad_input, *rest = _norm_backward(dy, input, weight, stats, training, [needs_input, *needs_weight_bias])
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
    dy = activation_backward(grad_output, input, stats, relu_mask, "identity")
    needs_input, needs_residual, *rest = output_mask
    grad_input, *grads = _norm_backward(dy, input, weight, stats, training, [needs_input, *rest[:2]])
    grad_residual, *residual_grads = _norm_backward(
        dy, residual, residual_weight, residual_stats, residual_training, [needs_residual, *rest[2:]]
    )
    return grad_input, grad_residual, grads[0], grads[1], residual_grads[0], residual_grads[1]


def _norm_backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, training: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a norm's input, weight and bias from the masked ``dy``; ``(0,)`` where not requested."""
    normalized = xhat(input, stats)
    dbias = dy.sum(reduction_dims(dy))
    dweight = (dy * normalized).sum(reduction_dims(dy))
    empty = input.new_empty(0)
    grad_input, grad_weight, grad_bias = empty, empty, empty
    if output_mask[0]:
        dx = dy
        if training and dy.numel():
            count = dy.numel() // dy.shape[1]
            dx = dy - channels_view(dbias / count, dy) - normalized * channels_view(dweight / count, dy)
        grad_input = cast(dx * channels_view(stats[SCALE], dy), like=input)
    if output_mask[1]:
        grad_weight = dweight if weight is None else dweight.to(weight.dtype)
    if output_mask[2]:
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
    """Return a boolean tensor as a ``relu_mask``, packed to bits (layout in :mod:`fused_res.ops.schemas`).

    Args:
        mask: boolean tensor ``(N, C, ...)``.
        like: tensor whose memory format determines the order of the bits. Default: ``mask``.
    """
    rows = _rows(mask, is_channels_last(mask if like is None else like))
    bytes = F.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bytes * bytes.new_tensor(_BITS)).sum(2, dtype=torch.uint8)


def unpack_mask(relu_mask: Tensor, like: Tensor) -> Tensor:
    """Return the boolean tensor, of the shape and memory format of ``like``, that :func:`pack_mask` packed."""
    channels_last = is_channels_last(like)
    row_length = like.shape[1] if channels_last else math.prod(like.shape[2:])
    bits = (relu_mask.unsqueeze(2) & relu_mask.new_tensor(_BITS)).ne(0).flatten(1)[:, :row_length]
    if channels_last:
        return bits.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return bits.reshape(like.shape)


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    """Return ``x`` as the matrix ``(N * S, C)`` or ``(N * C, S)``."""
    if channels_last:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0] * x.shape[1], math.prod(x.shape[2:]))


def normalize(input: Tensor, stats: Tensor) -> Tensor:
    """Return ``norm(input) = (input - mean) * scale + shift`` in the dtype of ``stats``."""
    centered = input.to(stats.dtype) - channels_view(stats[MEAN], input)
    return torch.addcmul(channels_view(stats[SHIFT], input), centered, channels_view(stats[SCALE], input))


def xhat(input: Tensor, stats: Tensor) -> Tensor:
    """Return ``(input - mean) * invstd`` in the dtype of ``stats``."""
    return (input.to(stats.dtype) - channels_view(stats[MEAN], input)) * channels_view(stats[INVSTD], input)


def activate(z: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """Return ``act(z)``, the activation of :mod:`fused_res.ops.schemas` with this name, by PyTorch's functions."""
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return _FUNCTIONS[activation](z)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


def activation_grad(dy: Tensor, z: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """Return ``dy * act'(z)``, with the formulas of :mod:`fused_res.ops.schemas`."""
    if activation == "relu":
        return torch.where(z <= 0, 0, dy)
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, dy)
    if activation == "leaky_relu":
        return torch.where(z > 0, dy, dy * negative_slope)
    if activation == "silu":
        s = torch.sigmoid(z)
        return dy * (s * (1 + z * (1 - s)))
    check_activation(activation, ("identity",))
    return dy


def activation_backward(
    grad: Tensor,
    norm_input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    negative_slope: float = 0.01,
) -> Tensor:
    """Return the gradient with respect to the activation's input, in the dtype of ``stats``.

    Args:
        grad: gradient with respect to the activation's output.
        norm_input: input of the norm before the activation (a convolution's output).
        stats: statistics of that norm.
        relu_mask: packed mask of a ReLU, or None.
        activation: without a mask, the activation of ``norm(norm_input)``.
        negative_slope: slope of a leaky ReLU. Default: 0.01.
    """
    dy = grad.to(stats.dtype)
    if relu_mask is not None:
        check_activation(activation, RELU_OR_IDENTITY, " with a ReLU mask")
        return dy * unpack_mask(relu_mask, norm_input)
    return (
        dy
        if activation == "identity"
        else activation_grad(dy, normalize(norm_input, stats), activation, negative_slope)
    )


def apply_prologue(input: Tensor, stats: Tensor | None, relu: bool) -> Tensor:
    """Return an operand after its prologue: ``act(norm(input))``, rounded, or ``input`` itself without ``stats``."""
    return input if stats is None else cast(activate(normalize(input, stats), relu_or_identity(relu)), like=input)


def cast(y: Tensor, like: Tensor) -> Tensor:
    """Return ``y`` in the dtype and strides of ``like``."""
    return _torch_compat.copy_to_new(torch.empty_like(like), y)


def channels_view(per_channel: Tensor, like: Tensor) -> Tensor:
    """Return a per-channel vector ``(C,)`` in a shape that broadcasts along dimension 1 of ``like``."""
    return per_channel.view(-1, *(1,) * (like.dim() - 2))


def reduction_dims(x: Tensor) -> list[int]:
    """Return all dimensions but the channels."""
    return [0, *range(2, x.dim())]
