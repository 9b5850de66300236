"""Argument checks of a residual block: its tensors against its spec, by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.ops.checks import check_batch, check_is_tensor, check_training_eps, is_parameter_dtype, or_float32
from fused_res.ops.geometry import conv_output_sizes
from fused_res.spec import RECOMPUTE, BlockSpec, UnitSpec, UnitTensors, by_unit


def check_recompute(recompute: str) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")


class TensorMeta(NamedTuple):
    """What planning needs to know of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    device: torch.device


def check_tensors(spec: BlockSpec, tensors: Sequence[Tensor | None]) -> None:
    """Whether a block's tensors are tensors at all, or None."""
    names = spec.tensor_names()
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            owner = names[index] if index < len(names) else "one too many"
            check_is_tensor(f"tensors[{index}] ({owner})", tensor)
    _check_count(names, tensors)


def _check_count(names: Sequence[str], tensors: Sequence[object]) -> None:
    if len(tensors) != len(names):
        raise ValueError(f"tensors must hold {len(names)} entries ({names[0]!r} ... {names[-1]!r}), got {len(tensors)}")


def check_block(
    spec: BlockSpec,
    input: TensorMeta,
    tensors: Sequence[TensorMeta | None],
    training: Sequence[bool],
    alone: bool = True,
) -> None:
    """Raises for the first tensor that does not fit; ``alone`` as in :func:`check_norm`."""
    _check_count(spec.tensor_names(), tensors)
    spatial = len(spec.units[0].stride)
    if len(input.shape) != spatial + 2:
        raise ValueError(f"input must have {spatial + 2} dimensions (N, C, ...), got {len(input.shape)}")
    units = by_unit(tensors)
    shape = tuple(input.shape)
    for index, unit in enumerate(spec.units):
        shape = _check_unit(unit, str(index), shape, input, units[index], training[index], alone)
    shortcut = tuple(input.shape)
    if spec.projection is not None:
        shortcut = _check_unit(spec.projection, "shortcut", shortcut, input, units[-1], training[-1], alone)
    if spec.shortcut != "none" and shortcut != shape:
        raise ValueError(f"shortcut has the shape {shortcut}, the chain's output {shape}: they cannot be added")
    if spec.pool is not None and spatial != 2:
        raise ValueError(f"pool is for images: input must have 4 dimensions, got {spatial + 2}")


def _check_unit(
    spec: UnitSpec,
    owner: str,
    shape: tuple[int, ...],
    input: TensorMeta,
    tensors: UnitTensors,
    training: bool,
    alone: bool,
) -> tuple[int, ...]:
    """Of ``input``, the block's, the dtype and the device; returns the shape of what the unit makes of ``shape``."""
    weight, bias, *norm = tensors
    if weight is None or len(weight.shape) != len(shape):
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{owner}.weight must have {len(shape)} dimensions, got {got}")
    for name, meta in (("weight", weight), ("bias", bias)):
        if meta is not None and meta.dtype != input.dtype:
            raise TypeError(f"{owner}.{name} must have the input's dtype {input.dtype}, got {meta.dtype}")
    if weight.shape[1] * spec.groups != shape[1]:
        raise ValueError(
            f"{owner}.weight {tuple(weight.shape)} with groups={spec.groups} reads"
            f" {weight.shape[1] * spec.groups} channels, and is given {shape[1]}"
        )
    channels = weight.shape[0]
    if channels % spec.groups:
        raise ValueError(f"{owner}.weight makes {channels} channels, which groups={spec.groups} does not divide")
    _, *names = UnitTensors._fields
    for name, meta in zip(names, (bias, *norm), strict=True):
        if meta is not None and tuple(meta.shape) != (channels,):
            raise ValueError(f"{owner}.{name} must have the shape ({channels},), got {tuple(meta.shape)}")
    for name, meta in zip(names[1:], norm, strict=True):
        if meta is not None and not is_parameter_dtype(meta.dtype, input.dtype):
            dtypes = f"{input.dtype}{or_float32(input.dtype)}"
            raise TypeError(f"{owner}.{name} must be of the input's dtype {dtypes}, got {meta.dtype}")
    for name, meta in zip(UnitTensors._fields, tensors, strict=True):
        if meta is not None and meta.device != input.device:
            raise ValueError(f"{owner}.{name} must be on {input.device} as the input is, got {meta.device}")
    if (norm[2] is None) != (norm[3] is None):
        raise ValueError(f"{owner}.running_mean and running_var must both be given, or neither")
    if norm[2] is None and not training:
        raise ValueError(f"{owner}.running_mean and running_var are needed where training is False")
    sizes = conv_output_sizes(shape[2:], weight.shape[2:], spec.stride, spec.padding, spec.dilation)
    if any(size < 1 for size in sizes):
        raise ValueError(f"{owner}: input of {shape[2:]} is too small for a kernel of {tuple(weight.shape[2:])}")
    made = (shape[0], channels, *sizes)
    if training:
        check_training_eps(spec.eps, f"{owner}.")
        if alone:
            check_batch(made)
    return made
