"""Fake (meta) implementations of the operators: the shape, dtype and strides of their results, without data.

``torch.compile``, ``torch.export`` and ``FakeTensorMode`` call them during tracing. Each function gets the operator's
arguments as attributes of one object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_res.ops.memory_format import (
    conv_output_is_channels_last,
    conv_output_shape,
    is_channels_last,
    pool_output_shape,
    relu_mask_shape,
    to_memory_format,
)
from fused_res.ops.schemas import stats_dtype


def _new_stats(input: Tensor) -> Tensor:
    return input.new_empty((5, input.shape[1]), dtype=stats_dtype(input.dtype))


def _empty_like_if(template: Tensor, requested: bool) -> Tensor:
    return torch.empty_like(template) if requested else template.new_empty(0)


def _mask(a: Any) -> Tensor:
    return a.input.new_empty(relu_mask_shape(a.input) if a.save_mask else (0,), dtype=torch.uint8)


def _backward(a: Any) -> tuple[Tensor, ...]:
    vector = _like_weight(a.weight, a.stats)
    return tuple(map(_empty_like_if, (a.input, a.input, vector, vector), a.output_mask))


def _backward_pair(a: Any) -> tuple[Tensor, ...]:
    vector, residual_vector = _like_weight(a.weight, a.stats), _like_weight(a.residual_weight, a.stats)
    return tuple(
        map(_empty_like_if, (a.input, a.residual, vector, vector, residual_vector, residual_vector), a.output_mask)
    )


def _like_weight(weight: Tensor | None, stats: Tensor) -> Tensor:
    return stats.new_empty(stats.shape[1]) if weight is None else torch.empty_like(weight)


def _merge_stats(a: Any) -> Tensor:
    return a.partials.new_empty((5, a.partials.shape[2]), dtype=torch.float64 if a.double else torch.float32)


def _conv(a: Any, channels_last: bool) -> Tensor:
    output = a.input.new_empty(conv_output_shape(a.input, a.weight, a.stride, a.padding, a.dilation))
    return to_memory_format(output, channels_last)


def _partials(output: Tensor, requested: bool = True) -> Tensor:
    return output.new_empty((1, 3, output.shape[1]) if requested else 0, dtype=torch.float64)


def _conv_bn_stats(a: Any) -> tuple[Tensor, Tensor]:
    output = _conv(a, is_channels_last(a.input))
    return output, _partials(output, a.partials)


def _conv_dgrad(a: Any) -> tuple[Tensor, Tensor]:
    shape = (a.grad_output.shape[0], a.weight.shape[1], *a.grad_output.shape[2:])
    sums_shape = (2, a.weight.shape[1]) if a.input_stats is not None else (0,)
    sums = a.grad_output.new_empty(sums_shape, dtype=stats_dtype(a.grad_output.dtype))
    return to_memory_format(a.grad_output.new_empty(shape), True), sums


def _max_pool(a: Any) -> tuple[Tensor, Tensor]:
    output = a.input.new_empty(pool_output_shape(a.input, a.kernel_size, a.stride, a.padding))
    output = to_memory_format(output, is_channels_last(a.input))
    return output, torch.empty_like(output, dtype=torch.uint8)


#: Operator name -> its fake implementation, a function of the operator's arguments by name.
FAKES: dict[str, Callable[[Any], Any]] = {
    "batch_norm_stats": lambda a: _new_stats(a.input),
    "batch_norm_act_forward": lambda a: (torch.empty_like(a.input), _new_stats(a.input), _mask(a)),
    "batch_norm_act_apply": lambda a: (torch.empty_like(a.input), _mask(a)),
    "batch_norm_act_inference_": lambda a: None,
    "batch_norm_act_backward": _backward,
    "batch_norm_act_backward_pair": _backward_pair,
    "add_masked_": lambda a: None,
    "update_running_stats": lambda a: None,
    "batch_norm_partials": lambda a: _partials(a.input),
    "merge_stats": _merge_stats,
    "batch_norm_sums": lambda a: a.stats.new_empty((2 if a.residual_stats is None else 3, a.stats.shape[1])),
    "batch_norm_act_dx": lambda a: torch.empty_like(a.input),
    "conv_bias_act": lambda a: _conv(a, conv_output_is_channels_last(a.input, a.weight)),
    "conv_bn_stats": _conv_bn_stats,
    "conv_dgrad": _conv_dgrad,
    "conv_wgrad": lambda a: torch.empty_like(a.weight),
    "max_pool_forward": _max_pool,
    "max_pool_backward": lambda a: torch.empty_like(a.input),
}
