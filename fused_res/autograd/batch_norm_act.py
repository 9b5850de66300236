"""``batch_norm_act`` as an autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_res import distributed
from fused_res.backends import registry
from fused_res.backends.reference.batch_norm_act import batch_norm_act as reference
from fused_res.backends.reference.batch_norm_act import channels_view, reduced, unpack_mask
from fused_res.dispatch.backend import Kernels
from fused_res.ops import MEAN, VAR, stats_dtype


def affine_stats(scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The ``stats`` of a norm that is nothing but its scale and shift; None where there is none."""
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
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, ``stats`` and ``relu_mask``; with the statistics of a group of processes, where ``group`` names one."""
    if not group:
        return kernels.batch_norm_act_forward(
            input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps, relu, save_mask
        )
    partials = distributed.gather_partials(kernels.batch_norm_partials(input), group)
    stats = kernels.merge_stats(partials, weight, bias, eps, input.dtype == torch.float64)
    output, mask = kernels.batch_norm_act_apply(input, stats, residual, residual_stats, relu, save_mask)
    return output, stats, mask


class BatchNormAct(Function):
    """Returns the output and ``stats``; running statistics are the caller's to update."""

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
        relu: bool,
        backend: str,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = registry.resolve(backend, input.device)
        save_mask = relu and residual is not None
        residual_stats = affine_stats(residual_scale, residual_shift, stats_dtype(input.dtype))
        output, stats, mask = forward(
            kernels, group, input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps,
            relu, save_mask,
        )  # fmt: skip
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        # Only the gradient of residual_scale reads the residual.
        read = residual if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(input, weight, stats, mask if save_mask else None, read, residual_scale, residual_stats)
        ctx.options = training, eps, relu, backend
        ctx.group = group
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 13
        input, weight, stats, mask, residual, residual_scale, residual_stats = ctx.saved_tensors
        training, _, relu, backend = ctx.options
        kernels = registry.resolve(backend, input.device)
        wanted = ctx.needs_input_grad[:6]
        grads: Sequence[Tensor | None]
        # What goes through a group's statistics is done apart; the rest is as for one process.
        rest = (False, wanted[1], False, False, *wanted[4:]) if ctx.group else wanted
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.group:
                raise RuntimeError("a norm with statistics of several processes cannot be differentiated twice")
            grads = _differentiable_backward(grad_output, ctx.saved_tensors, ctx.options, wanted, kernels)
        elif True not in rest:
            grads = (None,) * 6
        elif residual_stats is None:
            flags = rest[:4]
            grads = kernels.batch_norm_act_backward(grad_output, input, weight, stats, mask, training, relu, flags)
            grads = *grads, None, None
        else:
            # Where the residual is not read, any tensor of its shape will do.
            residual = input if residual is None else residual
            grads = kernels.batch_norm_act_backward_pair(
                grad_output, input, weight, stats, residual, residual_scale, residual_stats, mask, training, False, rest
            )
        if ctx.group:
            through = _group_backward(kernels, ctx.group, grad_output, input, stats, mask, relu and mask is None)
            grads = through[0], grads[1], *through[1:], *grads[4:]
        return *(grad if flag else None for grad, flag in zip(grads, wanted, strict=True)), *(None,) * 7


def _group_backward(
    kernels: Kernels, group: str, grad_output: Tensor, input: Tensor, stats: Tensor, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the last two are those of this process's part, as of any other layer."""
    sums = kernels.batch_norm_sums(grad_output, input, stats, mask, relu, None, None)
    count = input.numel() // max(input.shape[1], 1)
    totals = distributed.total_sums(sums, count, group)
    return kernels.batch_norm_act_dx(grad_output, input, stats, mask, relu, totals, count), sums[1], sums[0]


def _differentiable_backward(
    grad_output: Tensor,
    saved: tuple[Any, ...],
    options: tuple[bool, float, bool, str],
    wanted: tuple[bool, ...],
    kernels: Kernels,
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph that can be differentiated again (eager only).

    The ReLU's second derivative is zero, so its mask is a constant; and without a scale of its own the residual's
    values are not needed.
    """
    input, weight, stats, mask, residual, residual_scale, _ = saved
    training, eps, relu, _ = options
    dy = grad_output
    if mask is not None:
        dy = dy * unpack_mask(mask, input)
    elif relu:
        with torch.no_grad():
            passes = ~(kernels.batch_norm_act_apply(input, stats, None, None, False, False)[0] <= 0)
        dy = dy * passes
    y, *_ = reference(input, stats[MEAN], stats[VAR], weight, None, None, training, eps, relu=False)
    sources = [
        t if flag and t is not None else None for t, flag in zip((input, weight), wanted[:1] + wanted[2:3], strict=True)
    ]
    asked = [source for source in sources if source is not None]
    made = iter(torch.autograd.grad(y, asked, dy, create_graph=True) if asked else ())
    grad_input, grad_weight = (None if source is None else next(made) for source in sources)
    wide = dy.to(stats.dtype)
    grad_bias = wide.sum(reduced(wide))
    if residual_scale is None:
        return grad_input, dy, grad_weight, grad_bias, None, None
    scale = channels_view(residual_scale.to(wide.dtype), wide)
    grad_scale = None if residual is None else (wide * residual).sum(reduced(wide))
    return grad_input, (wide * scale).to(dy.dtype), grad_weight, grad_bias, grad_scale, grad_bias
