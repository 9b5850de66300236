"""Launches of ``kernels/batch_norm_act.py``: whole norms, in as few kernels as they take without atomics.

In training a forward is three (partial statistics, their merge, apply), a backward three; with running statistics a
forward is one. The halves are operators of their own: :mod:`fused_res.backends.triton.batch_norm_sync`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res import _torch_compat, ops
from fused_res.backends.reference import batch_norm_act as reference
from fused_res.backends.triton.batch_norm_sync import batch_norm_sums, launch_dx, merge_stats, tile_partials
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import operator
from fused_res.backends.triton.tiles import accumulator, tiling
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import dense, is_channels_last, laid_out, packed_shape, restored


@operator
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
        return merge_stats(tile_partials(dense(input)), weight, bias, eps, input.dtype == torch.float64)
    if training:
        return reference.batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    channels, block = input.shape[1], 128
    stats = input.new_empty((5, channels), dtype=stats_dtype(input.dtype))
    launch(
        kernels.fold_kernel, (triton.cdiv(channels, block),),
        stats, running_mean, running_var, weight, bias, channels, eps, accumulator(input.dtype), block,
    )  # fmt: skip
    return stats


@operator
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
    given, input = input, dense(input)
    running = None
    if training or not input.numel():
        stats = batch_norm_stats(input, weight, bias, running_mean, running_var, training, eps)
    else:
        stats = input.new_empty((5, input.shape[1]), dtype=stats_dtype(input.dtype))
        running = (running_mean, running_var, weight, bias, eps)
    output, mask = _apply(input, torch.empty_like(input), stats, residual, residual_stats, relu, save_mask, running)
    return restored(output, given, input), stats, mask


@operator
def batch_norm_act_apply(
    input: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    x = dense(input)
    output, mask = _apply(x, torch.empty_like(x), stats, residual, residual_stats, relu, save_mask, None)
    return restored(output, input, x), mask


@operator
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
    x = dense(input)
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
    """``stats`` is read, or written from the ``running`` statistics, which are folded as they are read."""
    mask = input.new_empty(packed_shape(input) if save_mask else (0,), dtype=torch.uint8)
    if not input.numel():
        return output, mask
    if residual is not None:
        residual = laid_out(residual, is_channels_last(input))
    cut = tiling(input)
    *folded, eps = running or (None, None, None, None, 0.0)
    launch(
        kernels.apply_kernel, (cut.tiles * cut.blocks,),
        input, output, residual, residual_stats, stats, *folded, mask if save_mask else None, *cut.matrix,
        eps, relu, running is not None, *cut.shape, accumulator(input.dtype), **cut.options,
    )  # fmt: skip
    return output, mask


@operator
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
    wanted = [*output_mask, False, False]
    grads = _backward(grad_output, input, weight, stats, None, None, None, relu_mask, training, False, relu, wanted)
    return grads[:4]


@operator
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
    given, input = input, dense(input)
    grad_output = laid_out(grad_output, is_channels_last(input))
    residual_last = is_channels_last(residual if residual is not None else input)
    if residual is not None:
        residual = laid_out(residual, is_channels_last(input))
    grad_input, grad_residual, *of_parameters = output_mask
    sums = None
    if any(of_parameters) or (grad_input and training) or (grad_residual and residual_training):
        sums = batch_norm_sums(grad_output, input, stats, relu_mask, relu, residual, residual_stats)
    dx = torch.empty_like(input) if grad_input else None
    dresidual = torch.empty_like(input) if grad_residual else None
    if (grad_input or grad_residual) and input.numel():
        launch_dx(
            grad_output, input, stats, residual, residual_stats, relu_mask, sums, dx, dresidual,
            input.numel() // input.shape[1], relu, training, residual_training,
        )  # fmt: skip

    def parameter(row: int, wanted: bool, like: Tensor | None) -> Tensor:
        if not wanted:
            return input.new_empty(0)
        assert sums is not None
        # A copy: what an operator returns must not share memory.
        return sums[row].to(sums.dtype if like is None else like.dtype, copy=True)

    return (
        input.new_empty(0) if dx is None else restored(dx, given, input),
        input.new_empty(0) if dresidual is None else laid_out(dresidual, residual_last),
        parameter(1, output_mask[2], weight),
        parameter(0, output_mask[3], weight),
        parameter(2, output_mask[4], residual_weight),
        parameter(0, output_mask[5], residual_weight),
    )


@operator
def add_masked_(self: Tensor, grad: Tensor, relu_mask: Tensor | None) -> None:
    """``self += grad`` where the mask, which lies in ``grad``'s order, says so."""
    if not grad.numel():
        return
    into = laid_out(self, is_channels_last(grad))
    cut = tiling(grad)
    launch(
        kernels.add_masked_kernel, (cut.tiles * cut.blocks,),
        into, grad, relu_mask, *cut.matrix, *cut.shape, accumulator(grad.dtype), **cut.options,
    )  # fmt: skip
    if into is not self:
        self.copy_(into)


@operator
def update_running_stats(
    running_mean: list[Tensor], running_var: list[Tensor], stats: list[Tensor], momentum: list[float]
) -> None:
    """For all units of a block at once."""
    running = [*running_mean, *running_var]
    batch = [s[ops.MEAN] for s in stats] + [s[ops.VAR] for s in stats]
    if any(old.dtype != new.dtype for old, new in zip(running, batch, strict=True)):
        reference.update_running_stats(running_mean, running_var, stats, momentum)
        return
    _torch_compat.average_in_place(running, batch, [*momentum] * 2)
