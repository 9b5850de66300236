"""Convolutions of a block: ATen's, but for those that make a single pixel.

On a map of 1x1 pixels a padded 3x3 kernel meets the input with its centre alone, and a library still reads all nine
taps of the weight. In the last stage of a ResNet on small images the weight *is* the memory traffic (ResNet-18 on
32x32 images: 33 of 45 MB). There the convolution is a matrix product for each tap that meets the input, straight from
the channels_last weight, and the gradient of the other taps is zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fused_res.spec import UnitSpec

#: More taps than this and ATen's one call is faster than the products.
_MOST_TAPS = 4


def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, spec: UnitSpec) -> Tensor:
    """``conv(input, weight) + bias`` of a unit: ``(N, C, ...)`` and ``(K, C / groups, ...)`` to ``(N, K, ...)``."""
    assert weight is not None  # the plan has checked
    taps = _taps(input, weight, spec)
    if taps is None:
        # torch.convolution is aten.convolution with half the call overhead.
        return torch.convolution(
            input, weight, bias, spec.stride, spec.padding, spec.dilation, False, spec.no_output_padding, spec.groups
        )
    # The weight first: for a handful of images twice as fast as the other way round.
    (pixel, tap), *more = taps
    columns = torch.mm(weight[tap], input[pixel].t())
    for pixel, tap in more:
        columns.addmm_(weight[tap], input[pixel].t())
    z = columns.t().contiguous()
    if bias is not None:
        z += bias
    return z[:, :, None, None]


def backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, spec: UnitSpec, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; of ``input`` only the shape is read unless ``output_mask[1]``."""
    assert weight is not None  # the plan has checked
    taps = _taps(input, weight, spec)
    if taps is None:
        return torch.ops.aten.convolution_backward.default(
            grad,
            input,
            weight,
            None if bias is None else [bias.shape[0]],
            spec.stride,
            spec.padding,
            spec.dilation,
            False,
            spec.no_output_padding,
            spec.groups,
            output_mask,
        )
    dz = grad.flatten(1)
    grad_input = torch.zeros_like(input) if output_mask[0] else None
    grad_weight = torch.zeros_like(weight) if output_mask[1] else None
    for pixel, tap in taps:
        if grad_input is not None:
            grad_input[pixel] = torch.mm(dz, weight[tap])
        if grad_weight is not None:
            torch.mm(dz.t(), input[pixel], out=grad_weight[tap])
    return grad_input, grad_weight, dz.sum(0) if output_mask[2] else None


Index = tuple[slice, slice, int, int]


def _taps(input: Tensor, weight: Tensor, spec: UnitSpec) -> tuple[tuple[Index, Index], ...] | None:
    """Pairs of an input pixel and the tap that meets it, where these are all there is to a convolution."""
    sizes = input.shape[2:]
    if len(sizes) != 2 or sizes[0] > 2 or sizes[1] > 2 or spec.groups > 1 or isinstance(sizes[0], torch.SymInt):
        return None
    if weight.dtype not in (torch.float32, torch.float64):
        return None
    if not weight.is_contiguous(memory_format=torch.channels_last):
        return None
    return _pairs(tuple(sizes), tuple(weight.shape[2:]), spec)


@lru_cache(maxsize=1024)
def _pairs(sizes: tuple[int, ...], kernel: tuple[int, ...], spec: UnitSpec) -> tuple[tuple[Index, Index], ...] | None:
    met = []
    for size, taps, stride, pad, dilation in zip(sizes, kernel, spec.stride, spec.padding, spec.dilation, strict=True):
        if (size + 2 * pad - dilation * (taps - 1) - 1) // stride != 0:
            return None  # more than one pixel of output
        positions = [tap * dilation - pad for tap in range(taps)]
        met.append([(position, tap) for tap, position in enumerate(positions) if 0 <= position < size])
    every = slice(None)
    pairs = tuple(((every, every, y, x), (every, every, i, j)) for y, i in met[0] for x, j in met[1])
    return pairs if 0 < len(pairs) <= _MOST_TAPS else None
