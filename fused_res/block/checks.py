"""Validation of a residual block's tensors against its spec; errors name the tensor, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.ops.checks import (
    check_is_tensor,
    check_training_eps,
    check_values_per_channel,
    is_parameter_dtype,
    or_float32,
)
from fused_res.ops.geometry import conv_output_sizes
from fused_res.spec import RECOMPUTE_LEVELS, BlockSpec, UnitSpec, UnitTensors, group_by_unit


def check_recompute(recompute: str) -> None:
    """Raise ValueError unless ``recompute`` is a known level."""
    if recompute not in RECOMPUTE_LEVELS:
        raise ValueError(f"recompute must be one of {RECOMPUTE_LEVELS}, got {recompute!r}")


class TensorMeta(NamedTuple):
    """The metadata of a tensor that a plan depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    device: torch.device


def check_tensors(spec: BlockSpec, tensors: Sequence[Tensor | None]) -> None:
    """Raise unless a block's list of tensors has the right length and contains tensors and None only."""
    names = spec.tensor_names()
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            owner = names[index] if index < len(names) else "unexpected"
            check_is_tensor(f"tensors[{index}] ({owner})", tensor)
    _check_count(names, tensors)


def _check_count(names: Sequence[str], tensors: Sequence[object]) -> None:
    if len(tensors) != len(names):
        raise ValueError(f"tensors must have {len(names)} entries ({names[0]!r} ... {names[-1]!r}), got {len(tensors)}")


def check_block(
    spec: BlockSpec,
    input: TensorMeta,
    tensors: Sequence[TensorMeta | None],
    training: Sequence[bool],
    single_process: bool = True,
) -> None:
    """Raise ValueError or TypeError for the first tensor that does not fit the spec.

    Args:
        single_process: no other process contributes to the batch statistics, see :func:`check_norm`.
    """
    _check_count(spec.tensor_names(), tensors)
    spatial = len(spec.units[0].stride)
    if len(input.shape) != spatial + 2:
        raise ValueError(f"input must have {spatial + 2} dimensions (N, C, ...), got {len(input.shape)}")
    units = group_by_unit(tensors)
    shape = tuple(input.shape)
    for index, unit in enumerate(spec.units):
        shape = _check_unit(unit, str(index), shape, input, units[index], training[index], single_process)
    shortcut = tuple(input.shape)
    if spec.projection is not None:
        shortcut = _check_unit(spec.projection, "shortcut", shortcut, input, units[-1], training[-1], single_process)
    if spec.shortcut != "none" and shortcut != shape:
        raise ValueError(
            f"shortcut has the shape {shortcut}, which cannot be added to the chain's output of shape {shape}"
        )
    if spec.pool is not None and spatial != 2:
        raise ValueError(f"input must have 4 dimensions for a block with a pool, got {spatial + 2}")


def _check_unit(
    spec: UnitSpec,
    owner: str,
    shape: tuple[int, ...],
    input: TensorMeta,
    tensors: UnitTensors,
    training: bool,
    single_process: bool,
) -> tuple[int, ...]:
    """Check one unit and return the shape of its output.

    Args:
        owner: name of the unit in error messages.
        shape: shape of the unit's input.
        input: the block's input, whose dtype and device the unit's tensors must match.
    """
    weight, bias, *norm = tensors
    if weight is None or len(weight.shape) != len(shape):
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{owner}.weight must have {len(shape)} dimensions, got {got}")
    if bias is not None and bias.dtype != input.dtype:
        raise TypeError(f"{owner}.bias must have the input's dtype {input.dtype}, got {bias.dtype}")
    if weight.shape[1] * spec.groups != shape[1]:
        raise ValueError(
            f"{owner}.weight {tuple(weight.shape)} with groups={spec.groups} expects"
            f" {weight.shape[1] * spec.groups} input channels, got {shape[1]}"
        )
    channels = weight.shape[0]
    if channels % spec.groups:
        raise ValueError(f"{owner}.weight has {channels} output channels, which groups={spec.groups} does not divide")
    _, *names = UnitTensors._fields
    for name, meta in zip(names, (bias, *norm), strict=True):
        if meta is not None and tuple(meta.shape) != (channels,):
            raise ValueError(f"{owner}.{name} must have the shape ({channels},), got {tuple(meta.shape)}")
    for name, meta in (("weight", weight), *zip(names[1:], norm, strict=True)):
        if meta is not None and not is_parameter_dtype(meta.dtype, input.dtype):
            dtypes = f"{input.dtype}{or_float32(input.dtype)}"
            raise TypeError(f"{owner}.{name} must have the input's dtype {dtypes}, got {meta.dtype}")
    for name, meta in zip(UnitTensors._fields, tensors, strict=True):
        if meta is not None and meta.device != input.device:
            raise ValueError(f"{owner}.{name} must be on the input's device {input.device}, got {meta.device}")
    if (norm[2] is None) != (norm[3] is None):
        raise ValueError(f"{owner}.running_mean and running_var must both be given, or neither")
    if norm[2] is None and not training:
        raise ValueError(f"{owner}.running_mean and running_var are required when training is False")
    sizes = conv_output_sizes(shape[2:], weight.shape[2:], spec.stride, spec.padding, spec.dilation)
    if any(size < 1 for size in sizes):
        raise ValueError(f"{owner}: input size {shape[2:]} is too small for kernel size {tuple(weight.shape[2:])}")
    output = (shape[0], channels, *sizes)
    if training:
        check_training_eps(spec.eps, f"{owner}.")
        if single_process:
            check_values_per_channel(output)
    return output
