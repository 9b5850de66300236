"""Whether arguments fit: found out by name, at the boundary, before anything is computed or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fused_res._torch_compat import FakeTensor
from fused_res.ops.geometry import conv_output_sizes, same_padding

Activation = Literal["relu", "identity"]
ACTIVATIONS = ("relu", "identity")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_input(input: Tensor) -> None:
    check_is_tensor("input", input)
    if input.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input must be one of {names}, got {input.dtype}")
    if input.layout is not torch.strided:
        raise TypeError(f"input must be a strided tensor, got one of layout {input.layout}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")


def check_momentum(momentum: float) -> None:
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if not math.isfinite(momentum):  # PyTorch takes any number, also below 0 and above 1
        raise ValueError(f"momentum must be finite, got {momentum}")


def check_batch(shape: Sequence[int]) -> None:
    """PyTorch's own check, in its own words: one value has no variance."""
    values = shape[0]
    for size in shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_training_eps(eps: float, owner: str = "") -> None:
    """As PyTorch has it: in evaluation zero will do."""
    if eps == 0:
        raise ValueError(f"{owner}eps must be above 0 when training, got {eps}")


# A batch norm


def check_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    alone: bool,
    eps: float,
) -> None:
    """Raises for the first argument that does not fit.

    ``alone``: no other process brings values for the batch's statistics.
    """
    check_input(input)
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, got {training!r}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    shape = input.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"input must have 2 to 5 dimensions (N, C, ...), got {len(shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training is False")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        _check_per_channel(input, name, tensor)
    if training:
        check_training_eps(eps)
        if alone:
            check_batch(shape)


def check_residual(input: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    """Likewise for what is added to a norm, and its factors for each channel."""
    if (scale is None) != (shift is None):
        raise ValueError("residual_scale and residual_shift must both be given, or neither")
    if residual is None:
        if scale is not None:
            raise ValueError("residual_scale and residual_shift are given without a residual")
        return
    check_is_tensor("residual", residual)
    if residual.shape != input.shape:
        raise ValueError(f"residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != input.dtype:
        raise TypeError(f"residual must have input's dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"residual must be on {input.device} as input is, got {residual.device}")
    _check_per_channel(input, "residual_scale", scale)
    _check_per_channel(input, "residual_shift", shift)


def _check_per_channel(input: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    check_is_tensor(name, tensor)
    if tensor.shape != input.shape[1:2]:
        raise ValueError(f"{name} must have the shape ({input.shape[1]},), got {tuple(tensor.shape)}")
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device} as input is, got {tensor.device}")
    if not is_parameter_dtype(tensor.dtype, input.dtype):
        raise TypeError(f"{name} must be of input's dtype {input.dtype}{or_float32(input.dtype)}, got {tensor.dtype}")


def is_parameter_dtype(dtype: torch.dtype, input: torch.dtype) -> bool:
    """Whether a norm of this input takes parameters and statistics of this dtype, as PyTorch's do."""
    return dtype == input or (dtype == torch.float32 and input != torch.float64)


def or_float32(input: torch.dtype) -> str:
    return "" if input in (torch.float32, torch.float64) else " or float32"


# A convolution with its epilogue

Size = int | Sequence[int]  # one for all dimensions, or a list or tuple
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_Meta = tuple[torch.Size, torch.dtype, torch.device]


def check_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Geometry:
    """Raises for the first argument that does not fit; returns stride, padding and dilation for each dimension."""
    sizes: list[Any] = [tuple(size) if isinstance(size, list) else size for size in (stride, padding, dilation)]
    try:
        metas: list[Any] = [(t.shape, t.dtype, t.device) for t in (input, weight)]
        metas += [None if t is None else (t.shape, t.dtype, t.device) for t in (bias, residual)]
    except AttributeError:
        check_operands(weight, bias, residual)
        raise
    # Sizes may be symbolic while something traces, and no keys of a dictionary.
    if not torch.compiler.is_compiling() and not isinstance(input, FakeTensor):
        try:
            return _check_convolution(*metas, *sizes, groups)
        except TypeError:
            pass  # perhaps of an argument that is no key of a dictionary: below it is named
    return _check_convolution.__wrapped__(*metas, *sizes, groups)


def check_operands(weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Whether these are tensors at all."""
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None or name == "weight":
            check_is_tensor(name, tensor)


@lru_cache(maxsize=4096)
def _check_convolution(
    input: _Meta,
    weight: _Meta,
    bias: _Meta | None,
    residual: _Meta | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Geometry:
    (shape, dtype, device), filters = input, weight[0]
    rank = len(shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"input must have 3 to 5 dimensions (N, C, ...), got {rank + 2}")
    if len(filters) != rank + 2:
        raise ValueError(f"weight must have {rank + 2} dimensions as input has, got {len(filters)}")
    strides, dilations = _each(stride, rank, "stride", 1), _each(dilation, rank, "dilation", 1)
    if isinstance(padding, str):
        paddings = _named_padding(padding, strides, dilations, filters[2:])
    else:
        paddings = _each(padding, rank, "padding", 0)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a whole number of at least 1, got {groups!r}")
    if filters[1] * groups != shape[1]:
        raise ValueError(
            f"input must have {filters[1] * groups} channels for weight {tuple(filters)} and groups={groups},"
            f" got {shape[1]}"
        )
    if filters[0] % groups:
        raise ValueError(f"weight makes {filters[0]} channels, which groups={groups} does not divide")
    sizes = conv_output_sizes(shape[2:], filters[2:], strides, paddings, dilations)
    if any(size < 1 for size in sizes):
        raise ValueError(f"input of size {tuple(shape[2:])} is too small for a kernel of {tuple(filters[2:])}")
    output = (shape[0], filters[0], *sizes)
    wanted = (("weight", weight, filters), ("bias", bias, filters[:1]), ("residual", residual, output))
    for name, meta, expected in wanted:
        if meta is None:
            continue
        if meta[0] != expected:
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(meta[0])}")
        if meta[1] != dtype:
            raise TypeError(f"{name} must have input's dtype {dtype}, got {meta[1]}")
        if meta[2] != device:
            raise ValueError(f"{name} must be on {device} as input is, got {meta[2]}")
    return strides, paddings, dilations


def _each(value: Size, rank: int, name: str, least: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else value
    if not isinstance(values, tuple) or len(values) != rank or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be a whole number of at least {least}, or {rank} of them, got {value!r}")
    return values


def _named_padding(
    name: str, stride: tuple[int, ...], dilation: tuple[int, ...], kernel: Sequence[int]
) -> tuple[int, ...]:
    if name == "valid":
        return (0,) * len(stride)
    if name != "same":
        raise ValueError(f"padding must be 'same', 'valid' or whole numbers, got {name!r}")
    padding = same_padding(kernel, stride, dilation)
    if padding is None:
        raise ValueError("padding='same' must be as much on both sides, with stride 1: give numbers")
    return padding
