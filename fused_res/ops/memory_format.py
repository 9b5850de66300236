"""Memory formats of the kernels' operands, channels_last (NHWC) or contiguous (NCHW), and shapes of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res.ops.geometry import conv_output_sizes


def is_channels_last(input: Tensor) -> bool:
    """Return whether kernels process ``input`` as channels_last, ``(N * S, C)``, or as contiguous, ``(N * C, S)``.

    A tensor with one pixel per image has both layouts. It counts as channels_last, which vectorizes better, unless it
    has a single channel.
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


def to_memory_format(input: Tensor, channels_last: bool) -> Tensor:
    """Return ``input`` in channels_last or contiguous memory, without a copy if it is already."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(input.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    return input.contiguous(memory_format=format)


def to_dense_layout(input: Tensor) -> Tensor:
    """Return ``input`` as a dense tensor in the layout of :func:`is_channels_last`.

    Only an input with gaps in memory, or with permuted strides, is copied.
    """
    return to_memory_format(input, is_channels_last(input))


def restore_strides(output: Tensor, input: Tensor, dense_input: Tensor) -> Tensor:
    """Return ``output`` with the strides of ``torch.empty_like(input)``.

    Args:
        output: a result with the strides of ``dense_input``.
        input: the operator's argument.
        dense_input: the tensor that the kernel read, ``input`` itself or a dense copy of it.
    """
    return output if dense_input is input else torch.empty_like(input).copy_(output)


def relu_mask_shape(input: Tensor) -> tuple[int, int]:
    """Return the shape of a ``relu_mask`` (uint8, one bit per element) for a tensor like ``input``."""
    n, c, s = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    return (n * s, (c + 7) // 8) if is_channels_last(input) else (n * c, (s + 7) // 8)


def pool_output_shape(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Return the output shape of a max pooling of ``input`` ``(N, C, H, W)`` in floor mode."""
    sizes = conv_output_sizes(input.shape[2:], kernel_size, stride, padding, (1,) * len(kernel_size))
    return [*input.shape[:2], *sizes]


def conv_output_shape(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return the shape ``(N, K, ...)`` of a convolution's output."""
    sizes = conv_output_sizes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return input.shape[0], weight.shape[0], *sizes


def conv_output_is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution's output is channels_last, as ATen decides.

    It is if the strides of either operand are channels_last and not also contiguous, or if the weight is in oneDNN's
    blocked format.
    """
    return weight.is_mkldnn or _has_channels_last_strides(input) or _has_channels_last_strides(weight)


def _has_channels_last_strides(tensor: Tensor) -> bool:
    # With a single channel the strides are ambiguous. Besides, oneDNN's bfloat16 convolution returns wrong results for
    # 3D inputs with one channel and channels_last_3d strides.
    return tensor.dim() > 3 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
