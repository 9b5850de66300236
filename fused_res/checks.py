"""Whether a block's tensors fit its spec: found out by name, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_res.spec import BlockSpec, UnitSpec


class TensorMeta(NamedTuple):
    """What planning needs to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def check_block(
    spec: BlockSpec,
    input: TensorMeta,
    tensors: Sequence[TensorMeta | None],
    training: Sequence[bool],
    alone: bool = True,
) -> None:
    """Raises for the first tensor that does not fit, by name, before anything is computed or written.

    ``alone``: no other process brings values for the batch's statistics.
    """
    names = spec.tensor_names()
    if len(tensors) != len(names):
        raise ValueError(f"tensors must hold {len(names)} entries ({names[0]!r} ... {names[-1]!r}), got {len(tensors)}")
    spatial = len(spec.units[0].stride)
    if len(input.shape) != spatial + 2:
        raise ValueError(f"input must have {spatial + 2} dimensions (N, C, ...), got {len(input.shape)}")
    shape = tuple(input.shape)
    for index, unit in enumerate(spec.units):
        shape = _check_unit(unit, str(index), shape, input.dtype, tensors[6 * index :], training[index])
        if alone and training[index]:
            check_batch(shape)
    if spec.projection is None:
        shortcut = tuple(input.shape)
    else:
        last = len(spec.units)
        shortcut = _check_unit(
            spec.projection, "shortcut", tuple(input.shape), input.dtype, tensors[6 * last :], training[last]
        )
        if alone and training[last]:
            check_batch(shortcut)
    if spec.shortcut != "none" and shortcut != shape:
        raise ValueError(f"shortcut has the shape {shortcut}, the chain's output {shape}: they cannot be added")
    if spec.pool is not None and spatial != 2:
        raise ValueError(f"pool is for images: input must have 4 dimensions, got {spatial + 2}")


def _check_unit(
    spec: UnitSpec,
    owner: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tensors: Sequence[TensorMeta | None],
    training: bool,
) -> tuple[int, ...]:
    weight, bias, *norm = tensors[:6]
    if weight is None or len(weight.shape) != len(shape):
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{owner}.weight must have {len(shape)} dimensions, got {got}")
    for name, meta in (("weight", weight), ("bias", bias)):
        if meta is not None and meta.dtype != dtype:
            raise TypeError(f"{owner}.{name} must have the input's dtype {dtype}, got {meta.dtype}")
    if weight.shape[1] * spec.groups != shape[1]:
        raise ValueError(
            f"{owner}.weight {tuple(weight.shape)} with groups={spec.groups} reads"
            f" {weight.shape[1] * spec.groups} channels, and is given {shape[1]}"
        )
    channels = weight.shape[0]
    if channels % spec.groups:
        raise ValueError(f"{owner}.weight makes {channels} channels, which groups={spec.groups} does not divide")
    for name, meta in zip(
        ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"), (bias, *norm), strict=True
    ):
        if meta is not None and tuple(meta.shape) != (channels,):
            raise ValueError(f"{owner}.{name} must have the shape ({channels},), got {tuple(meta.shape)}")
    if not training and (norm[2] is None or norm[3] is None):
        raise ValueError(f"{owner}.running_mean and running_var are needed where training is False")
    check_eps(spec.eps, training, f"{owner}.")
    taps = zip(shape[2:], weight.shape[2:], spec.stride, spec.padding, spec.dilation, strict=True)
    output = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in taps
    ]
    if any(size < 1 for size in output):
        raise ValueError(f"{owner}: input of {shape[2:]} is too small for a kernel of {tuple(weight.shape[2:])}")
    return (shape[0], channels, *output)


def check_eps(eps: float, training: bool, owner: str = "") -> None:
    """PyTorch's own check: a channel whose values are all the same has the variance 0."""
    if not (eps > 0 if training else eps >= 0):  # NaN is refused, too
        wanted = "greater than 0 when training" if training else "at least 0"
        raise ValueError(f"{owner}eps must be {wanted}, got {eps}")


def check_batch(shape: Sequence[int]) -> None:
    """PyTorch's own check, in its own words: one value has no variance."""
    values = shape[0]
    for size in shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")
