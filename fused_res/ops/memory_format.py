"""How kernels see a tensor: as rows of channels, or as planes; and the shapes of what they make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res.ops.geometry import conv_output_sizes


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
    sizes = conv_output_sizes(input.shape[2:], kernel_size, stride, padding, (1,) * len(kernel_size))
    return [*input.shape[:2], *sizes]


def convolved(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The shape of a convolution's output."""
    sizes = conv_output_sizes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return input.shape[0], weight.shape[0], *sizes


def makes_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is rows of channels: as in ATen, if that of either operand is beyond doubt."""
    return weight.is_mkldnn or _is_rows(input) or _is_rows(weight)


def _is_rows(tensor: Tensor) -> bool:
    # A single channel says nothing; and oneDNN's bfloat16 is wrong for volumes of one that are called channels_last.
    return tensor.dim() > 3 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
