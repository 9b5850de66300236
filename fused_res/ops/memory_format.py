"""Memory formats of the kernels' operands, channels_last (NHWC) or contiguous (NCHW), and shapes of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fused_res.ops.geometry import conv_output_sizes

#: The channels_last memory format of each rank that has one.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    return not input.is_contiguous() and _is_dense_channels_last(input)


def to_memory_format(input: Tensor, channels_last: bool) -> Tensor:
    """Return ``input`` in channels_last or contiguous memory, without a copy if it is already.

    Only tensors of rank 4 and 5 have a channels_last format.
    """
    format = _CHANNELS_LAST.get(input.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    return input.contiguous(memory_format=format)


def to_stock_layout(input: Tensor) -> Tensor:
    """Return ``input`` as a dense tensor with the strides of the output of PyTorch's batch norm.

    PyTorch returns channels_last memory if ``input``'s strides are channels_last, with or without gaps, and contiguous
    memory for every other order of the dimensions. Only an input with gaps or permuted dimensions is copied.
    """
    if input.is_contiguous() or _is_dense_channels_last(input):
        return input
    return to_memory_format(input, has_channels_last_strides(input))


def is_permuted(input: Tensor) -> bool:
    """Return whether the strides are neither in the order of (N, C, ...), with or without gaps, nor channels_last."""
    if input.is_contiguous() or _is_dense_channels_last(input):
        return False
    return any(outer < inner for outer, inner in pairwise(input.stride()))


def has_same_layout(first: Tensor, second: Tensor) -> bool:
    """Return whether the sum of two tensors has the memory format of both, whichever is the first operand."""
    if first.stride() == second.stride():
        return True
    if first.is_contiguous() and second.is_contiguous():
        return True
    return _is_dense_channels_last(first) and _is_dense_channels_last(second)


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

    It is if the strides of either operand are channels_last, or if the weight is in oneDNN's blocked format.
    """
    return weight.is_mkldnn or has_channels_last_strides(input) or has_channels_last_strides(weight)


def _is_dense_channels_last(tensor: Tensor) -> bool:
    format = _CHANNELS_LAST.get(tensor.dim())
    return format is not None and tensor.is_contiguous(memory_format=format)


def has_channels_last_strides(tensor: Tensor) -> bool:
    """Return whether the strides are those of channels_last memory, with or without gaps.

    For more than one channel this is the rule of ATen's ``Tensor::suggest_memory_format``: a 1x1 weight, which is
    contiguous in both formats, is channels_last if its strides are those of ``to(memory_format=channels_last)``.
    """
    # With a single channel the strides are ambiguous. Besides, oneDNN's bfloat16 convolution returns wrong results for
    # 3D inputs with one channel and channels_last_3d strides.
    strides, shape, rank = tensor.stride(), tensor.shape, tensor.dim()
    if rank not in _CHANNELS_LAST or strides[1] != 1 or shape[1] == 1:
        return False
    extent = shape[1]  # of the dimensions inside this one
    for dim in range(rank - 1, 1, -1):
        if strides[dim] < extent:
            return False
        extent = strides[dim] * shape[dim]
    return strides[0] >= extent
