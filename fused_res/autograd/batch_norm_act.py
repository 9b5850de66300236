"""Autograd Function of ``batch_norm_act``: batch norm, residual addition and ReLU, with synchronized statistics."""

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
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass.

    Args:
        group: name of the process group that shares statistics, "" for none.

    Returns:
        The output, ``stats`` and the ReLU mask.
    """
    if not group:
        return kernels.batch_norm_act_forward(
            input, residual, residual_stats, weight, bias, running_mean, running_var, training, eps, relu, save_mask
        )
    partials = distributed.gather_partials(kernels.batch_norm_partials(input), group)
    stats = kernels.merge_stats(partials, weight, bias, eps, input.dtype == torch.float64)
    output, mask = kernels.batch_norm_act_apply(input, stats, residual, residual_stats, relu, save_mask)
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
        saved_residual = residual if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(
            input, weight, stats, mask if save_mask else None, saved_residual, residual_scale, residual_stats
        )
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
            flags = local[:4]
            grads = kernels.batch_norm_act_backward(grad_output, input, weight, stats, mask, training, relu, flags)
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
            norm_grads = _group_backward(kernels, ctx.group, grad_output, input, stats, mask, relu and mask is None)
            grads = norm_grads[0], grads[1], *norm_grads[1:], *grads[4:]
        return *(grad if flag else None for grad, flag in zip(grads, required, strict=True)), *(None,) * 7


def _group_backward(
    kernels: Kernels, group: str, grad_output: Tensor, input: Tensor, stats: Tensor, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of a norm with synchronized statistics.

    The gradients of weight and bias are those of the local shard, as for any other layer under data parallelism.
    """
    sums = kernels.batch_norm_sums(grad_output, input, stats, mask, relu, None, None)
    count = input.numel() // max(input.shape[1], 1)
    # The global sums times local count / global count: the kernel divides them by the local count.
    rescaled_sums = distributed.total_sums(sums, count, group)
    return kernels.batch_norm_act_dx(grad_output, input, stats, mask, relu, rescaled_sums, count), sums[1], sums[0]


def _differentiable_backward(
    grad_output: Tensor,
    saved: tuple[Any, ...],
    options: tuple[bool, float, bool, str],
    required: tuple[bool, ...],
    kernels: Kernels,
) -> tuple[Tensor | None, ...]:
    """Return the gradients as a differentiable graph, for double backward (eager only).

    The ReLU's second derivative is zero, so its mask is a constant. The residual's values are needed only if there is a
    ``residual_scale``.
    """
    input, weight, stats, mask, residual, residual_scale, _ = saved
    training, eps, relu, _ = options
    dy = grad_output
    if mask is not None:
        dy = dy * unpack_mask(mask, input)
    elif relu:
        with torch.no_grad():
            relu_mask = ~(kernels.batch_norm_act_apply(input, stats, None, None, False, False)[0] <= 0)
        dy = dy * relu_mask
    y, *_ = reference(input, stats[MEAN], stats[VAR], weight, None, None, training, eps, relu=False)
    sources = [
        t if flag and t is not None else None
        for t, flag in zip((input, weight), required[:1] + required[2:3], strict=True)
    ]
    leaves = [source for source in sources if source is not None]
    grads = iter(torch.autograd.grad(y, leaves, dy, create_graph=True) if leaves else ())
    grad_input, grad_weight = (None if source is None else next(grads) for source in sources)
    wide = dy.to(stats.dtype)  # at least float32
    grad_bias = wide.sum(reduction_dims(wide))
    if residual_scale is None:
        return grad_input, dy, grad_weight, grad_bias, None, None
    scale = channels_view(residual_scale.to(wide.dtype), wide)
    grad_scale = None if residual is None else (wide * residual).sum(reduction_dims(wide))
    return grad_input, (wide * scale).to(dy.dtype), grad_weight, grad_bias, grad_scale, grad_bias
