"""Validation of the public functions' arguments, by name, before anything is computed or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fused_res._torch_compat import FakeTensor
from fused_res.ops.geometry import conv_output_sizes, same_padding

Activation = Literal["identity", "relu", "relu6", "leaky_relu", "silu"]
#: The activations of a batch norm's elementwise pass, in the order of their codes in kernels.
ACTIVATIONS: tuple[Activation, ...] = ("identity", "relu", "relu6", "leaky_relu", "silu")
#: The activations that follow a residual addition, and those of convolutions' epilogues and operand prologues.
RELU_OR_IDENTITY: tuple[Activation, ...] = ("identity", "relu")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_input(input: Tensor) -> None:
    """Raise TypeError unless `input` is a strided tensor of a supported dtype."""
    check_is_tensor("input", input)
    if input.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"input's dtype must be one of {names}, got {input.dtype}")
    if input.layout is not torch.strided:
        raise TypeError(f"input must be a strided tensor, got a tensor of layout {input.layout}")


def check_activation(activation: str, allowed: Sequence[str] = ACTIVATIONS, context: str = "") -> None:
    """Raise ValueError unless `activation` is one of `allowed`. `context` says where these are allowed."""
    if activation not in allowed:
        raise ValueError(f"activation must be one of {allowed}{context}, got {activation!r}")


def check_negative_slope(negative_slope: float) -> None:
    """Raise unless `negative_slope`, that of a leaky ReLU, is a finite number."""
    if not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {negative_slope!r}")
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope must be finite, got {negative_slope}")


def relu_or_identity(relu: bool) -> Activation:
    """Return the name of the activation of a convolution's epilogue or operand prologue, which has a flag `relu`."""
    return "relu" if relu else "identity"


def check_momentum(momentum: float) -> None:
    """Raise unless `momentum` is a finite number."""
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if not math.isfinite(momentum):  # PyTorch accepts any number, also below 0 and above 1
        raise ValueError(f"momentum must be finite, got {momentum}")


def check_values_per_channel(shape: Sequence[int]) -> None:
    """Raise ValueError, with PyTorch's message, if a channel of `shape` has a single value, which has no variance."""
    values = shape[0]
    for size in shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def check_is_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value`, the argument `name`, is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_training_eps(eps: float, owner: str = "") -> None:
    """Raise ValueError if `eps` is 0, which PyTorch accepts in evaluation only. `owner` prefixes the message."""
    if eps == 0:
        raise ValueError(f"{owner}eps must be positive when training, got {eps}")


# Batch norm


def check_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    single_process: bool,
    eps: float,
) -> None:
    """Validate the arguments of a batch norm.

    Args:
        input: the norm's input ``(N, C, ...)``.
        running_mean, running_var, weight, bias: per-channel vectors ``(C,)``, or None.
        training: the norm uses the statistics of the batch.
        single_process: the statistics are of this process's batch only. Across a process group one value per channel is
            enough, because other ranks contribute more.
        eps: added to the variance.

    Raises:
        TypeError, ValueError: for the first invalid argument.
    """
    check_input(input)
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, got {training!r}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and non-negative, got {eps}")
    shape = input.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"input must have 2 to 5 dimensions (N, C, ...), got {len(shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are required when training is False")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        _check_per_channel(input, name, tensor)
    if training:
        check_training_eps(eps)
        if single_process:
            check_values_per_channel(shape)


def check_residual(input: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    """Validate the residual that is added to a norm's output, and its per-channel `scale` and `shift`."""
    if (scale is None) != (shift is None):
        raise ValueError("residual_scale and residual_shift must both be given, or neither")
    if residual is None:
        if scale is not None:
            raise ValueError("residual_scale and residual_shift require a residual")
        return
    check_is_tensor("residual", residual)
    if residual.shape != input.shape:
        raise ValueError(f"residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != input.dtype:
        raise TypeError(f"residual must have input's dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"residual must be on {input.device} like input, got {residual.device}")
    _check_per_channel(input, "residual_scale", scale)
    _check_per_channel(input, "residual_shift", shift)


def _check_per_channel(input: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    check_is_tensor(name, tensor)
    if tensor.shape != input.shape[1:2]:
        raise ValueError(f"{name} must have the shape ({input.shape[1]},), got {tuple(tensor.shape)}")
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on {input.device} like input, got {tensor.device}")
    if not is_parameter_dtype(tensor.dtype, input.dtype):
        raise TypeError(f"{name} must be of input's dtype {input.dtype}{or_float32(input.dtype)}, got {tensor.dtype}")


def is_parameter_dtype(dtype: torch.dtype, input_dtype: torch.dtype) -> bool:
    """Return whether a norm of this input dtype accepts parameters and running statistics of `dtype`, as in PyTorch."""
    return dtype == input_dtype or (dtype == torch.float32 and input_dtype != torch.float64)


def or_float32(input_dtype: torch.dtype) -> str:
    """Return the part of an error message that names float32, where it is accepted besides the input's dtype."""
    return "" if input_dtype in (torch.float32, torch.float64) else " or float32"


# Convolution with its epilogue

Size = int | Sequence[int]  # one integer for all spatial dimensions, or one for each
SpatialGeometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
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
) -> SpatialGeometry:
    """Validate the arguments of ``conv_bias_act``; return stride, padding and dilation per spatial dimension.

    Raises:
        TypeError, ValueError: for the first invalid argument.
    """
    sizes: list[Any] = [tuple(size) if isinstance(size, list) else size for size in (stride, padding, dilation)]
    try:
        metas: list[Any] = [(t.shape, t.dtype, t.device) for t in (input, weight)]
        metas += [None if t is None else (t.shape, t.dtype, t.device) for t in (bias, residual)]
    except AttributeError:
        check_operands(weight, bias, residual)
        raise
    # Sizes may be symbolic during tracing, and symbolic sizes are not hashable.
    if not torch.compiler.is_compiling() and not isinstance(input, FakeTensor):
        try:
            return _check_convolution(*metas, *sizes, groups)
        except TypeError:
            pass  # possibly an unhashable argument: the uncached call below raises the error that names it
    return _check_convolution.__wrapped__(*metas, *sizes, groups)


def check_operands(weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise TypeError unless `weight` is a tensor, and `bias` and `residual` are tensors or None."""
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
) -> SpatialGeometry:
    (shape, dtype, device), weight_shape = input, weight[0]
    rank = len(shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"input must have 3 to 5 dimensions (N, C, ...), got {rank + 2}")
    if len(weight_shape) != rank + 2:
        raise ValueError(f"weight must have {rank + 2} dimensions like input, got {len(weight_shape)}")
    out_channels, group_channels, kernel_size = *weight_shape[:2], weight_shape[2:]
    strides, dilations = _expand_size(stride, rank, "stride", 1), _expand_size(dilation, rank, "dilation", 1)
    if isinstance(padding, str):
        paddings = _resolve_padding(padding, strides, dilations, kernel_size)
    else:
        paddings = _expand_size(padding, rank, "padding", 0)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if group_channels * groups != shape[1]:
        raise ValueError(
            f"input must have {group_channels * groups} channels for weight {tuple(weight_shape)} and groups={groups},"
            f" got {shape[1]}"
        )
    if out_channels % groups:
        raise ValueError(f"weight has {out_channels} output channels, which groups={groups} does not divide")
    sizes = conv_output_sizes(shape[2:], kernel_size, strides, paddings, dilations)
    if any(size < 1 for size in sizes):
        raise ValueError(f"input of size {tuple(shape[2:])} is too small for a kernel of {tuple(kernel_size)}")
    output = (shape[0], out_channels, *sizes)
    operands = (("weight", weight, weight_shape), ("bias", bias, weight_shape[:1]), ("residual", residual, output))
    for name, meta, expected in operands:
        if meta is None:
            continue
        if meta[0] != expected:
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(meta[0])}")
        if meta[1] != dtype:
            raise TypeError(f"{name} must have input's dtype {dtype}, got {meta[1]}")
        if meta[2] != device:
            raise ValueError(f"{name} must be on {device} like input, got {meta[2]}")
    return strides, paddings, dilations


def _expand_size(value: Size, rank: int, name: str, minimum: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else value
    if (
        not isinstance(values, tuple)
        or len(values) != rank
        or any(not isinstance(v, int) or v < minimum for v in values)
    ):
        kind = "positive" if minimum == 1 else "non-negative"
        raise ValueError(f"{name} must be a {kind} integer, or a tuple of {rank}, got {value!r}")
    return values


def _resolve_padding(
    name: str, stride: tuple[int, ...], dilation: tuple[int, ...], kernel: Sequence[int]
) -> tuple[int, ...]:
    if name == "valid":
        return (0,) * len(stride)
    if name != "same":
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {name!r}")
    padding = same_padding(kernel, stride, dilation)
    if padding is None:
        raise ValueError("padding='same' must be symmetric, with stride 1: pass integers instead")
    return padding
