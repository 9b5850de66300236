"""The operators' schemas, in one table, and what each returns under a fake tensor.

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
:func:`is_channels_last`. A tensor that was not asked for comes back with the shape ``(0,)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

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


def is_channels_last(input: Tensor) -> bool:
    """Whether kernels see ``input`` as rows of channels (else as planes, one for each channel).

    A tensor with one pixel an image is both; rows of channels vectorise better, unless there is one channel only.
    """
    if input.dim() == 2:
        return True
    if input.shape[1] == 1:
        return False
    if all(size == 1 for size in input.shape[2:]):
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        input.dim() in formats and not input.is_contiguous() and input.is_contiguous(memory_format=formats[input.dim()])
    )


def laid_out(input: Tensor, channels_last: bool) -> Tensor:
    """``input`` in channels_last memory, or contiguous; itself if it is already."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(input.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    return input.contiguous(memory_format=format)


def dense(input: Tensor) -> Tensor:
    """``input`` in the layout that kernels see it in; itself unless it has holes or an order of its own."""
    return laid_out(input, is_channels_last(input))


def restored(output: Tensor, input: Tensor, read: Tensor) -> Tensor:
    """``output`` with the strides that PyTorch gives an output for ``input``, where kernels ``read`` a copy of it."""
    return output if read is input else torch.empty_like(input).copy_(output)


def packed_shape(input: Tensor) -> tuple[int, int]:
    """The shape of a ``relu_mask`` for a tensor like ``input``."""
    n, c, s = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    return (n * s, (c + 7) // 8) if is_channels_last(input) else (n * c, (s + 7) // 8)


def pooled_shape(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """The shape behind a max pooling of ``input`` ``(N, C, H, W)`` with floor mode."""
    spatial = zip(input.shape[2:], kernel_size, stride, padding, strict=True)
    return [*input.shape[:2], *((size + 2 * p - k) // s + 1 for size, k, s, p in spatial)]


def _new_stats(input: Tensor) -> Tensor:
    return input.new_empty((5, input.shape[1]), dtype=stats_dtype(input.dtype))


def _fake_stats(input: Tensor, *_: object) -> Tensor:
    return _new_stats(input)


def _fake_forward(input: Tensor, residual: Tensor | None, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    mask = packed_shape(input) if rest[-1] else (0,)
    return torch.empty_like(input), _new_stats(input), input.new_empty(mask, dtype=torch.uint8)


def _fake_apply(input: Tensor, stats: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    mask = packed_shape(input) if rest[-1] else (0,)
    return torch.empty_like(input), input.new_empty(mask, dtype=torch.uint8)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    channels = _like_weight(weight, stats)
    return _where_wanted((input, input, channels, channels), output_mask)


def _fake_backward_pair(
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
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    channels, residual_channels = _like_weight(weight, stats), _like_weight(residual_weight, stats)
    templates = (input, residual, channels, channels, residual_channels, residual_channels)
    return _where_wanted(templates, output_mask)


def _like_weight(weight: Tensor | None, stats: Tensor) -> Tensor:
    return stats.new_empty(stats.shape[1]) if weight is None else torch.empty_like(weight)


def _where_wanted(templates: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(template) if wanted else template.new_empty(0)
        for template, wanted in zip(templates, output_mask, strict=True)
    )


def _fake_in_place(*_: object) -> None:
    return None


def _fake_partials(input: Tensor) -> Tensor:
    return input.new_empty((1, 3, input.shape[1]), dtype=torch.float64)


def _fake_merge_stats(partials: Tensor, *rest: object) -> Tensor:
    return partials.new_empty((5, partials.shape[2]), dtype=torch.float64 if rest[-1] else torch.float32)


def _fake_sums(grad_output: Tensor, input: Tensor, stats: Tensor, *rest: object) -> Tensor:
    return stats.new_empty((2 if rest[-1] is None else 3, stats.shape[1]))


def _fake_like_second(first: Tensor, second: Tensor, *_: object) -> Tensor:
    return torch.empty_like(second)


def convolved(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The shape of a convolution's output."""
    sizes = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return input.shape[0], weight.shape[0], *sizes


def makes_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is rows of channels: as in ATen, if that of either operand is beyond doubt."""
    return weight.is_mkldnn or _is_rows(input) or _is_rows(weight)


def _is_rows(tensor: Tensor) -> bool:
    return tensor.dim() > 3 and tensor.stride(1) == 1 and not tensor.is_contiguous()


def _fake_conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: object,
) -> Tensor:
    output = input.new_empty(convolved(input, weight, stride, padding, dilation))
    return laid_out(output, makes_channels_last(input, weight))


def _fake_conv_bn_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    partials: bool,
) -> tuple[Tensor, Tensor]:
    output = laid_out(input.new_empty(convolved(input, weight, stride, padding, dilation)), is_channels_last(input))
    return output, _fake_partials(output) if partials else output.new_empty(0, dtype=torch.float64)


def _fake_dgrad(
    grad_output: Tensor,
    output: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    weight: Tensor,
    *input: object,
) -> tuple[Tensor, Tensor]:
    shape = (output.shape[0], weight.shape[1], *output.shape[2:])
    grad_input = laid_out(output.new_empty(shape), True)
    return grad_input, stats.new_empty((2, weight.shape[1]) if input[1] is not None else 0)


def _fake_wgrad(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[7])


def _fake_pool(
    input: Tensor,
    stats: Tensor | None,
    relu: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(input, kernel_size, stride, padding)
    format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)
    return output, torch.empty_like(output, dtype=torch.uint8)


def _fake_pool_backward(grad_output: Tensor, indices: Tensor, input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input)


FAKES: dict[str, Callable] = {
    "batch_norm_stats": _fake_stats,
    "batch_norm_act_forward": _fake_forward,
    "batch_norm_act_apply": _fake_apply,
    "batch_norm_act_inference_": _fake_in_place,
    "batch_norm_act_backward": _fake_backward,
    "batch_norm_act_backward_pair": _fake_backward_pair,
    "add_masked_": _fake_in_place,
    "update_running_stats": _fake_in_place,
    "batch_norm_partials": _fake_partials,
    "merge_stats": _fake_merge_stats,
    "batch_norm_sums": _fake_sums,
    "batch_norm_act_dx": _fake_like_second,
    "conv_bias_act": _fake_conv_bias_act,
    "conv_bn_stats": _fake_conv_bn_stats,
    "conv_dgrad": _fake_dgrad,
    "conv_wgrad": _fake_wgrad,
    "max_pool_forward": _fake_pool,
    "max_pool_backward": _fake_pool_backward,
}

# A Library undefines its operators when it is collected.
_libraries: dict[str, torch.library.Library] = {}


def define(
    namespace: str,
    schemas: Mapping[str, str] = SCHEMAS,
    fakes: Mapping[str, Callable] = FAKES,
    internal: Mapping[str, str] | None = None,
) -> None:
    """Defines operators, each with its fake, in ``namespace``; ``internal`` ones are called by no one who traces."""
    library = _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, schema in (internal or {}).items():
        library.define(name + schema)
    for name, schema in schemas.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)


def operator(namespace: str, name: str, implementation: Callable[..., Any], *keys: str) -> Callable[..., Any]:
    """Registers a Python ``implementation`` for dispatch keys (``"CPU"``, ``"CUDA"``); returns what is to be called.

    For plain tensors that is ``implementation``: the way through the dispatcher and back into Python takes longer than
    a small kernel. While something traces (compilation, fake tensors, subclasses) it is the operator.
    """
    for key in keys:
        _libraries[namespace].impl(name, implementation, key)
    overload = getattr(getattr(torch.ops, namespace), name).default

    @functools.wraps(implementation)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*arguments)
        first = arguments[0]
        while isinstance(first, (list, tuple)):
            first = first[0]
        plain = type(first) is Tensor or type(first) is Parameter
        return implementation(*arguments) if plain else overload(*arguments)

    return call
