"""Autograd Function of ``batch_norm_act``: batch norm, addition and activation, with synchronized statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_res import distributed
from fused_res.backends import registry
from fused_res.backends.reference.batch_norm_act import batch_norm_act as reference
from fused_res.backends.reference.batch_norm_act import channels_view, reduction_dims, unpack_mask
from fused_res.dispatch.backend import Kernels
from fused_res.ops import MEAN, VAR, stats_dtype


def affine_stats(scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``stats`` with which a norm is the affine map ``x * scale + shift``, or None without ``scale``.

    They have mean 0 and invstd 1; VAR is not read.
    """
    if scale is None or shift is None:
        return None
    scale = scale.to(dtype)
    zeros = torch.zeros_like(scale)
    return torch.stack((zeros, torch.ones_like(scale), scale, shift.to(dtype), zeros))


def forward(
    kernels: Kernels,
    group: str,
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
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass.

    Args:
        group: name of the process group that shares statistics, "" for none.

    Returns:
        The output, ``stats`` and the ReLU mask.
    """
    if not group:
        return kernels.batch_norm_act_forward(
            input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps, activation,
            save_mask, negative_slope,
        )  # fmt: skip
    partials = distributed.gather_partials(kernels.batch_norm_partials(input), group)
    stats = kernels.merge_stats(partials, weight, bias, eps, input.dtype == torch.float64)
    output, mask = kernels.batch_norm_act_apply(
        input, stats, residual, residual_stats, activation, save_mask, negative_slope
    )
    return output, stats, mask


class BatchNormAct(Function):
    """Returns the output and ``stats``. The caller updates the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual_scale: Tensor | None,
        residual_shift: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
        activation: str,
        negative_slope: float,
        backend: str,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = registry.resolve(backend, input.device)
        save_mask = activation == "relu" and residual is not None
        residual_stats = affine_stats(residual_scale, residual_shift, stats_dtype(input.dtype))
        output, stats, mask = forward(
            kernels, group, input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps,
            activation, save_mask, negative_slope,
        )  # fmt: skip
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        # Only the gradient of residual_scale reads the residual, and only the double backward of SiLU the bias.
        saved_residual = residual if ctx.needs_input_grad[4] else None
        saved_bias = bias if activation == "silu" else None
        saved_mask = mask if save_mask else None
        ctx.save_for_backward(
            input, weight, saved_bias, stats, saved_mask, saved_residual, residual_scale, residual_stats
        )
        ctx.options = training, eps, activation, negative_slope
        ctx.backend, ctx.group = backend, group
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 14
        input, weight, _, stats, mask, residual, residual_scale, residual_stats = ctx.saved_tensors
        training, _, activation, negative_slope = ctx.options
        kernels = registry.resolve(ctx.backend, input.device)
        required = ctx.needs_input_grad[:6]
        grads: Sequence[Tensor | None]
        # With a process group, the gradients of input, weight and bias need the all-reduced sums and are computed
        # separately; the others are the same as in a single process.
        local = (False, required[1], False, False, *required[4:]) if ctx.group else required
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.group:
                raise RuntimeError("process_group: double backward is not supported for synchronized statistics")
            grads = _differentiable_backward(grad_output, ctx.saved_tensors, ctx.options, required, kernels)
        elif True not in local:
            grads = (None,) * 6
        elif residual_stats is None:
            options = training, activation, local[:4], negative_slope
            grads = kernels.batch_norm_act_backward(grad_output, input, weight, stats, mask, *options)
            grads = *grads, None, None
        else:
            # If the residual was not saved, the kernel does not read it: any tensor of its shape is sufficient.
            residual = input if residual is None else residual
            grads = kernels.batch_norm_act_backward_pair(
                grad_output,
                input,
                weight,
                stats,
                residual,
                residual_scale,
                residual_stats,
                mask,
                training,
                False,
                local,
            )
        if ctx.group:
            saved = grad_output, input, stats, mask
            norm_grads = _group_backward(kernels, ctx.group, *saved, activation, negative_slope)
            grads = norm_grads[0], grads[1], *norm_grads[1:], *grads[4:]
        return *(grad if flag else None for grad, flag in zip(grads, required, strict=True)), *(None,) * 8


def _group_backward(
    kernels: Kernels,
    group: str,
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of a norm with synchronized statistics.

    The gradients of weight and bias are those of the local shard, as for any other layer under data parallelism.
    """
    operands = grad_output, input, stats, mask, activation
    sums = kernels.batch_norm_sums(*operands, None, None, negative_slope)
    count = input.numel() // max(input.shape[1], 1)
    # The global sums times local count / global count: the kernel divides them by the local count.
    rescaled_sums = distributed.total_sums(sums, count, group)
    return kernels.batch_norm_act_dx(*operands, rescaled_sums, count, negative_slope), sums[1], sums[0]


def _differentiable_backward(
    grad_output: Tensor,
    saved: tuple[Any, ...],
    options: tuple[bool, float, str, float],
    required: tuple[bool, ...],
    kernels: Kernels,
) -> tuple[Tensor | None, ...]:
    """Return the gradients as a differentiable graph, for double backward (eager only).

    Activations but SiLU are piecewise linear: their second derivative is zero, so their derivative is a constant. The
    residual's values are needed only if there is a ``residual_scale``.
    """
    input, weight, bias, stats, mask, residual, residual_scale, _ = saved
    training, eps, activation, negative_slope = options
    dy = grad_output
    differentiated = "identity"
    if mask is not None:
        dy = dy * unpack_mask(mask, input)
    elif activation == "silu":
        differentiated = activation
    elif activation != "identity":
        # The kernels' own derivative: the gradient of a residual, for a gradient of ones.
        flags = False, activation, [False, True, False, False], negative_slope
        with torch.no_grad():
            dy_by_z = kernels.batch_norm_act_backward(torch.ones_like(dy), input, None, stats, None, *flags)[1]
        dy = dy * dy_by_z
    norm = stats[MEAN], stats[VAR], weight, bias, None, training, eps
    y, *_ = reference(input, *norm, differentiated)
    requires_bias = required[3] and bias is not None
    leaves = {"input": required[0], "weight": required[2] and weight is not None, "bias": requires_bias}
    values = {"input": input, "weight": weight, "bias": bias}
    names = [name for name, flag in leaves.items() if flag]
    found = torch.autograd.grad(y, [values[name] for name in names], dy, create_graph=True) if names else ()
    grads: dict[str, Tensor] = dict(zip(names, found, strict=True))
    wide = dy.to(stats.dtype)  # at least float32
    grad_bias = grads["bias"] if requires_bias else wide.sum(reduction_dims(wide))
    if residual_scale is None:
        return grads.get("input"), dy, grads.get("weight"), grad_bias, None, None
    scale = channels_view(residual_scale.to(wide.dtype), wide)
    grad_scale = None if residual is None else (wide * residual).sum(reduction_dims(wide))
    return grads.get("input"), (wide * scale).to(dy.dtype), grads.get("weight"), grad_bias, grad_scale, grad_bias
