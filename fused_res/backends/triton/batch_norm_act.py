"""Launchers of the kernels in ``kernels/batch_norm_act.py``: fused batch norm, residual addition and ReLU.

A forward pass in training launches three kernels (partial statistics, merge, apply), and so does a backward pass
(partial sums, merge, dx); a forward pass with running statistics launches one. No kernel uses atomics. The separate
passes are operators in :mod:`fused_res.backends.triton.batch_norm_sync`. Batch norm: Ioffe and Szegedy (2015),
https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res import _torch_compat, ops
from fused_res.backends.reference import batch_norm_act as reference
from fused_res.backends.triton.batch_norm_sync import batch_norm_sums, compute_partials, launch_dx, merge_stats
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import register_operator
from fused_res.backends.triton.tiles import accumulator_dtype, choose_tiling
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import (
    is_channels_last,
    relu_mask_shape,
    restore_strides,
    to_dense_layout,
    to_memory_format,
)


@register_operator
def batch_norm_stats(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    if training and input.numel():
        return merge_stats(compute_partials(to_dense_layout(input)), weight, bias, eps, input.dtype == torch.float64)
    if training:
        return reference.batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    channels, block = input.shape[1], 128
    stats = input.new_empty((5, channels), dtype=stats_dtype(input.dtype))
    launch(
        kernels.fold_kernel, (triton.cdiv(channels, block),),
        stats, running_mean, running_var, weight, bias, channels, eps, accumulator_dtype(input.dtype), block,
    )  # fmt: skip
    return stats


@register_operator
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
    original, input = input, to_dense_layout(input)
    running = None
    if training or not input.numel():
        stats = batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    else:
        stats = input.new_empty((5, input.shape[1]), dtype=stats_dtype(input.dtype))
        running = (running_mean, running_var, weight, bias, eps)
    output, mask = _apply(input, torch.empty_like(input), stats, residual, residual_stats, relu, save_mask, running)
    return restore_strides(output, original, input), stats, mask


@register_operator
def batch_norm_act_apply(
    input: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    x = to_dense_layout(input)
    output, mask = _apply(x, torch.empty_like(x), stats, residual, residual_stats, relu, save_mask, None)
    return restore_strides(output, input, x), mask


@register_operator
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
    x = to_dense_layout(input)
    _apply(x, x, None, residual, residual_stats, relu, False, (running_mean, running_var, weight, bias, eps))
    if x is not input:
        input.copy_(x)


def _apply(
    input: Tensor,
    output: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    save_mask: bool,
    running: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor]:
    """Launch the apply pass into ``output``, and return ``output`` and the ReLU mask.

    If ``running`` is None, ``stats`` is an input. Otherwise the kernel computes scale and shift from the running
    statistics, and stores them in ``stats`` if that is not None.
    """
    mask = input.new_empty(relu_mask_shape(input) if save_mask else (0,), dtype=torch.uint8)
    if not input.numel():
        return output, mask
    if residual is not None:
        residual = to_memory_format(residual, is_channels_last(input))
    tiling = choose_tiling(input)
    *running_args, eps = running or (None, None, None, None, 0.0)
    launch(
        kernels.apply_kernel, (tiling.tiles * tiling.blocks,),
        input, output, residual, residual_stats, stats, *running_args, mask if save_mask else None, *tiling.extents,
        eps, relu, running is not None, *tiling.constexprs, accumulator_dtype(input.dtype), **tiling.options,
    )  # fmt: skip
    return output, mask


@register_operator
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
    output_mask = [*output_mask, False, False]
    grads = _backward(
        grad_output, input, weight, stats, None, None, None, relu_mask, training, False, relu, output_mask
    )
    return grads[:4]


@register_operator
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
    return _backward(
        grad_output, input, weight, stats, residual, residual_weight, residual_stats, relu_mask, training,
        residual_training, False, output_mask,
    )  # fmt: skip


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_stats: Tensor | None,
    relu_mask: Tensor | None,
    training: bool,
    residual_training: bool,
    relu: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    original, input = input, to_dense_layout(input)
    grad_output = to_memory_format(grad_output, is_channels_last(input))
    residual_channels_last = is_channels_last(residual if residual is not None else input)
    if residual is not None:
        residual = to_memory_format(residual, is_channels_last(input))
    grad_input, grad_residual, *parameter_grads = output_mask
    sums = None
    if any(parameter_grads) or (grad_input and training) or (grad_residual and residual_training):
        sums = batch_norm_sums(grad_output, input, stats, relu_mask, relu, residual, residual_stats)
    dx = torch.empty_like(input) if grad_input else None
    dresidual = torch.empty_like(input) if grad_residual else None
    if (grad_input or grad_residual) and input.numel():
        launch_dx(
            grad_output, input, stats, residual, residual_stats, relu_mask, sums, dx, dresidual,
            input.numel() // input.shape[1], relu, training, residual_training,
        )  # fmt: skip

    def parameter_grad(row: int, requested: bool, like: Tensor | None) -> Tensor:
        if not requested:
            return input.new_empty(0)
        assert sums is not None
        # A copy, because an operator's outputs must not share memory.
        return sums[row].to(sums.dtype if like is None else like.dtype, copy=True)

    return (
        input.new_empty(0) if dx is None else restore_strides(dx, original, input),
        input.new_empty(0) if dresidual is None else to_memory_format(dresidual, residual_channels_last),
        parameter_grad(1, output_mask[2], weight),
        parameter_grad(0, output_mask[3], weight),
        parameter_grad(2, output_mask[4], residual_weight),
        parameter_grad(0, output_mask[5], residual_weight),
    )


@register_operator
def add_masked_(self: Tensor, grad: Tensor, relu_mask: Tensor | None) -> None:
    """Add ``grad`` to ``self`` in place where the mask, in the memory format of ``grad``, is set."""
    if not grad.numel():
        return
    target = to_memory_format(self, is_channels_last(grad))
    tiling = choose_tiling(grad)
    launch(
        kernels.add_masked_kernel, (tiling.tiles * tiling.blocks,),
        target, grad, relu_mask, *tiling.extents, *tiling.constexprs, accumulator_dtype(grad.dtype), **tiling.options,
    )  # fmt: skip
    if target is not self:
        self.copy_(target)


@register_operator
def update_running_stats(
    running_mean: list[Tensor], running_var: list[Tensor], stats: list[Tensor], momentum: list[float]
) -> None:
    """Update the running statistics of all units of a block at once."""
    running = [*running_mean, *running_var]
    batch = [s[ops.MEAN] for s in stats] + [s[ops.VAR] for s in stats]
    if any(old.dtype != new.dtype for old, new in zip(running, batch, strict=True)):
        reference.update_running_stats(running_mean, running_var, stats, momentum)
        return
    _torch_compat.foreach_lerp_(running, batch, [*momentum] * 2)
