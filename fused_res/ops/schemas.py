"""The operators' schemas in one table, and the conventions that every kernel of every backend follows.

Every backend registers kernels for the same schemas in a dispatcher namespace of its own (``fused_res_cpu::``, ...),
so two backends that run on the same device never fight over a dispatch key. C++ only *implements*; all definitions
are here. Words: ``stats`` is one tensor ``(5, C)`` of float32 (float64 for float64 input) with the rows

==========  ====================================================================================
mean        of the batch in training, the running mean else
invstd      ``1 / sqrt(var + eps)``
scale       ``weight * invstd``
shift       ``bias``, and what rounding ``mean`` took away, times ``scale``
var         unbiased, of the batch, as ``running_var`` takes it in; else the running variance itself
==========  ====================================================================================

and the normalised value is ``fma(x - mean, scale, shift)``, everywhere. (The usual
``fma(x, scale, bias - mean * scale)`` loses as many digits as the mean is larger than the deviation; the difference of
two close numbers is exact.) A ``residual`` with ``residual_stats`` is normalised likewise before it is added: the
projection of a block, which so is never written normalised.

``partials`` are float64 ``(P, 3, C)``: count, mean and sum of squared deviations of ``P`` parts of the batch, for
``merge_stats``. The operators bring one part; several processes stack theirs. ``sums`` are ``(2, C)``, ``sum dy`` and
``sum dy * xhat`` of the masked gradient, which processes may add up. (With a residual's stats there is a third row,
``sum dy * xhat`` of that.)

``conv_dgrad`` and ``conv_wgrad`` are the backward of ``conv_bn_stats`` for 1x1 kernels without padding or groups. They
take the gradient behind the norm and form that before it, ``dz = scale * (dy - sum dy / count - xhat * sum dy * xhat /
count)``, while they load (``sums`` None: statistics that are constants, ``dz = scale * dy``); ``dy`` is masked by
``relu_mask``, or where ``relu``, by the sign of the normalised ``output``. What was the convolution's operand is
``input``, or with ``input_stats`` the activation of it; then ``conv_dgrad`` returns the gradient masked by that
activation, with its sums. ``conv_dgrad`` knows no stride: its ``grad_input`` has the size of ``output``. It adds to it
``added``, where ``added_mask`` says so: the gradient of a shortcut.

``relu_mask`` is uint8, one bit an element, least significant first, in rows padded to whole bytes: a row is a pixel
``(N*S, ceil(C/8))`` in channels_last memory and a plane ``(N*C, ceil(S/8))`` in contiguous memory, see
:func:`fused_res.ops.memory_format.is_channels_last`. A result that is not requested has the shape ``(0,)``.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "batch_norm_stats": "(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps) -> Tensor",
    "batch_norm_act_forward": "(Tensor input, Tensor? residual, Tensor? residual_stats, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, bool training, float eps, bool relu, bool save_mask)"
    " -> (Tensor output, Tensor stats, Tensor relu_mask)",
    "batch_norm_act_apply": "(Tensor input, Tensor stats, Tensor? residual, Tensor? residual_stats, bool relu,"
    " bool save_mask) -> (Tensor output, Tensor relu_mask)",
    "batch_norm_act_inference_": "(Tensor(a!) input, Tensor? residual, Tensor? residual_stats, Tensor? weight,"
    " Tensor? bias, Tensor running_mean, Tensor running_var, float eps, bool relu) -> ()",
    "batch_norm_act_backward": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, Tensor? relu_mask,"
    " bool training, bool relu, bool[4] output_mask)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "batch_norm_act_backward_pair": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, Tensor residual,"
    " Tensor? residual_weight, Tensor residual_stats, Tensor? relu_mask, bool training, bool residual_training,"
    " bool[6] output_mask) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_residual_weight, Tensor grad_residual_bias)",
    "add_masked_": "(Tensor(a!) self, Tensor grad, Tensor? relu_mask) -> ()",
    "update_running_stats": "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] stats, float[] momentum)"
    " -> ()",
    # The halves of the norm, for whoever has something to do between them: a convolution's epilogue that brings the
    # statistics, its prologue that normalises, several processes that add theirs up.
    "batch_norm_partials": "(Tensor input) -> Tensor",
    "merge_stats": "(Tensor partials, Tensor? weight, Tensor? bias, float eps, bool double) -> Tensor",
    "batch_norm_sums": "(Tensor grad_output, Tensor input, Tensor stats, Tensor? relu_mask, bool relu,"
    " Tensor? residual, Tensor? residual_stats) -> Tensor",
    "batch_norm_act_dx": "(Tensor grad_output, Tensor input, Tensor stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count) -> Tensor",
    "conv_bias_act": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding,"
    " int[] dilation, int groups, bool relu) -> Tensor",
    "conv_bn_stats": "(Tensor input, Tensor weight, Tensor? bias, Tensor? input_stats, bool input_relu, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool partials) -> (Tensor output, Tensor partials)",
    "conv_dgrad": "(Tensor grad_output, Tensor output, Tensor stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count, Tensor weight, Tensor? input, Tensor? input_stats, bool input_relu, Tensor? added=None,"
    " Tensor? added_mask=None) -> (Tensor grad_input, Tensor sums)",
    "conv_wgrad": "(Tensor grad_output, Tensor output, Tensor stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count, Tensor weight, Tensor input, Tensor? input_stats, bool input_relu, int[] stride) -> Tensor",
    "max_pool_forward": "(Tensor input, Tensor? stats, bool relu, int[2] kernel_size, int[2] stride, int[2] padding)"
    " -> (Tensor output, Tensor indices)",
    "max_pool_backward": "(Tensor grad_output, Tensor indices, Tensor input, int[2] kernel_size, int[2] stride,"
    " int[2] padding) -> Tensor",
}

#: Which operators make up a stem: the unit in which backends have kernels.
STEMS: dict[str, tuple[str, ...]] = {
    "batch_norm_act": (
        "batch_norm_stats",
        "batch_norm_act_forward",
        "batch_norm_act_apply",
        "batch_norm_act_inference_",
        "batch_norm_act_backward",
        "batch_norm_act_backward_pair",
        "add_masked_",
        "update_running_stats",
    ),
    "batch_norm_sync": ("batch_norm_partials", "merge_stats", "batch_norm_sums", "batch_norm_act_dx"),
    "max_pool": ("max_pool_forward", "max_pool_backward"),
    "conv_bias_act": ("conv_bias_act",),
    "conv_bn_stats": ("conv_bn_stats",),
    "conv_dgrad": ("conv_dgrad",),
    "conv_wgrad": ("conv_wgrad",),
}

#: What only the CPU's backend has, behind its ``conv_*`` stems: packed weights, and convolutions with them.
CPU_SCHEMAS = {
    "pack_conv_weight": "(Tensor weight, int winograd, bool transposed) -> Tensor",
    "convolve": "(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int outputs, int[2] kernel_size,"
    " int[2] stride, int[2] padding, int[2] dilation, int tile, bool relu, bool partials)"
    " -> (Tensor output, Tensor partials)",
    "conv_weight_gradient": "(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding,"
    " int[2] dilation, bool winograd) -> Tensor",
    "conv_program": "(Tensor input, Tensor[] packed, Tensor[] bias, int[] steps, int arena, int chunk,"
    " int[] output_size) -> Tensor",
}

#: rows of ``stats``
MEAN, INVSTD, SCALE, SHIFT, VAR = range(5)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulation: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
