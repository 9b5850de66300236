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
two close numbers is exact.)

``relu_mask`` is uint8, one bit an element, least significant first, in rows padded to whole bytes: a row is a pixel
``(N*S, ceil(C/8))`` in channels_last memory and a plane ``(N*C, ceil(S/8))`` in contiguous memory, see
:func:`is_channels_last`. A tensor that was not asked for comes back with the shape ``(0,)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCHEMAS = {
    "batch_norm_stats": "(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps) -> Tensor",
    "batch_norm_act_forward": "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    " Tensor? running_var, bool training, float eps, bool relu, bool save_mask)"
    " -> (Tensor output, Tensor stats, Tensor relu_mask)",
    "batch_norm_act_apply": "(Tensor input, Tensor stats, bool relu) -> Tensor",
    "batch_norm_act_inference_": "(Tensor(a!) input, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor running_mean, Tensor running_var, float eps, bool relu) -> ()",
    "batch_norm_act_backward": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, Tensor? relu_mask,"
    " bool training, bool relu, bool[4] output_mask)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "add_masked_": "(Tensor(a!) self, Tensor grad, Tensor? relu_mask) -> ()",
    "update_running_stats": "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] stats, float[] momentum)"
    " -> ()",
    "max_pool_forward": "(Tensor input, Tensor? stats, bool relu, int[2] kernel_size, int[2] stride, int[2] padding)"
    " -> (Tensor output, Tensor indices)",
    "max_pool_backward": "(Tensor grad_output, Tensor indices, Tensor input, int[2] kernel_size, int[2] stride,"
    " int[2] padding) -> Tensor",
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


def _fake_apply(input: Tensor, stats: Tensor, relu: bool) -> Tensor:
    return torch.empty_like(input)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    relu: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = stats.new_empty(input.shape[1]) if weight is None else torch.empty_like(weight)
    templates = (input, input, channels, channels)
    made = (
        torch.empty_like(template) if wanted else template.new_empty(0)
        for template, wanted in zip(templates, output_mask, strict=True)
    )
    return tuple(made)  # type: ignore[return-value]


def _fake_in_place(*_: object) -> None:
    return None


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
    "add_masked_": _fake_in_place,
    "update_running_stats": _fake_in_place,
    "max_pool_forward": _fake_pool,
    "max_pool_backward": _fake_pool_backward,
}

# A Library undefines its operators when it is collected.
_libraries: dict[str, torch.library.Library] = {}


def define(namespace: str) -> None:
    """Defines every operator, with its fake, in ``namespace``."""
    library = _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", FAKES[name], lib=library)
