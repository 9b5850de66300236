"""Convolutions of a block: ATen's, but for those that make a single pixel or few.

On a map of 1x1 pixels a padded 3x3 kernel meets the input with its centre alone, and a library still reads all nine
taps of the weight. In the last stage of a ResNet on small images the weight *is* the memory traffic (ResNet-18 on
32x32 images: 33 of 45 MB). There the convolution is a matrix product for each tap that meets the input, straight from
the channels_last weight, and the gradient of the other taps is zero.

With a few pixels the weight is most of what is read and written, too, and ATen reorders it in every call. There, on a
CPU, all three products are of the weight as it lies in memory, a matrix of outputs and taps, and of what each pixel
meets, gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_res.layout import is_channels_last
from fused_res.spec import UnitSpec, convolved_sizes

#: More taps than this and ATen's one call is faster than the products.
_MOST_TAPS = 4
#: Of all images; with more pixels, or a smaller weight, ATen is as fast. Two Zen 4 cores, float32, forward and
#: backward: 512 to 512 channels, 3x3, 16 pixels 12.5 ms by ATen's, 6.6 by these; 256 to 256, 64 pixels 2.3 and 2.5;
#: 2048 to 512, 1x1, 16 pixels 4.9 and 2.0; 256 to 1024, 64 pixels 1.16 and 0.97.
_FEW_PIXELS, _FEW_PIXELS_POINTWISE = 32, 127
_LARGE_WEIGHT = 1 << 15


def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, spec: UnitSpec) -> Tensor:
    """``conv(input, weight) + bias`` of a unit: ``(N, C, ...)`` and ``(K, C / groups, ...)`` to ``(N, K, ...)``."""
    assert weight is not None  # the plan has checked
    if (few := _few(input, weight, spec)) is not None:
        columns = _columns(input, weight, spec, few)
        z = torch.mm(_matrix(weight), columns.t()).t().contiguous()
        if bias is not None:
            z += bias
        return z.view(input.shape[0], *few, -1).permute(0, 3, 1, 2)
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


def bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """``act(conv(input, weight) + bias [+ residual])`` as ATen has it: cuDNN's epilogue, or in place on its output."""
    if relu and input.is_cuda and input.dtype in (torch.float32, torch.float16) and input.dim() == 4 and input.numel():
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, stride, padding, dilation, groups)
        if is_channels_last(residual) == is_channels_last(input):
            return torch.cudnn_convolution_add_relu(
                input, weight, residual, None, bias, stride, padding, dilation, groups
            )
    y = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return finish_in_place(y, residual, relu)


def finish_in_place(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output.add_(residual)
    return output.relu_() if relu else output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, spec: UnitSpec, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; of ``input`` only the shape is read unless ``output_mask[1]``."""
    assert weight is not None  # the plan has checked
    if (few := _few(input, weight, spec)) is not None:
        return _backward_of_few(grad, input, weight, spec, few, output_mask)
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


def _few(input: Tensor, weight: Tensor, spec: UnitSpec) -> tuple[int, int] | None:
    """Height and width of the output, where that is few pixels, though not one an image, of a large weight."""
    if weight.numel() < _LARGE_WEIGHT or input.dim() != 4 or spec.groups > 1 or not weight.is_cpu:
        return None
    if weight.dtype not in (torch.float32, torch.float64) or any(isinstance(n, torch.SymInt) for n in input.shape):
        return None
    if not (is_channels_last(input) and weight.is_contiguous(memory_format=torch.channels_last)):
        return None
    height, width = convolved_sizes(input.shape[2:], weight.shape[2:], spec.stride, spec.padding, spec.dilation)
    most = _FEW_PIXELS_POINTWISE if weight.shape[2:] == (1, 1) else _FEW_PIXELS
    return (height, width) if height * width > 1 and 0 < input.shape[0] * height * width <= most else None


def _matrix(weight: Tensor) -> Tensor:
    """``(K, taps * C)``, as a channels_last weight lies in memory."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _columns(input: Tensor, weight: Tensor, spec: UnitSpec, output: tuple[int, int]) -> Tensor:
    """``(pixels, taps * C)``: what of the input each pixel of the output meets."""
    (high, wide), (rows, cols), taps = spec.padding, spec.stride, weight.shape[2:]
    padded = F.pad(input, (wide, wide, high, high)) if high or wide else input
    image, channel, row, col = padded.stride()
    spread = row * spec.dilation[0], col * spec.dilation[1]
    met = padded.as_strided(
        (input.shape[0], *output, *taps, input.shape[1]), (image, row * rows, col * cols, *spread, channel)
    )
    return met.flatten(3).flatten(0, 2)


def _backward_of_few(
    grad: Tensor, input: Tensor, weight: Tensor, spec: UnitSpec, output: tuple[int, int], output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dz = grad.permute(0, 2, 3, 1).flatten(0, 2)
    images, channels, height, width = input.shape
    outputs, _, *taps = weight.shape
    grad_input = grad_weight = None
    if output_mask[0]:
        met = torch.mm(dz, _matrix(weight)).view(images, *output, *taps, channels)
        (high, wide), (rows, cols) = spec.padding, spec.stride
        padded = input.new_zeros(images, height + 2 * high, width + 2 * wide, channels)
        for i in range(taps[0]):
            for j in range(taps[1]):
                y, x = i * spec.dilation[0], j * spec.dilation[1]
                last = y + (output[0] - 1) * rows + 1, x + (output[1] - 1) * cols + 1
                padded[:, y : last[0] : rows, x : last[1] : cols] += met[:, :, :, i, j]
        grad_input = padded[:, high : high + height, wide : wide + width].contiguous().permute(0, 3, 1, 2)
    if output_mask[1]:
        columns = _columns(input, weight, spec, output)
        grad_weight = torch.mm(dz.t(), columns).view(outputs, *taps, channels).permute(0, 3, 1, 2)
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
    if any(size != 1 for size in convolved_sizes(sizes, kernel, spec.stride, spec.padding, spec.dilation)):
        return None
    met = []
    for size, taps, pad, dilation in zip(sizes, kernel, spec.padding, spec.dilation, strict=True):
        positions = [tap * dilation - pad for tap in range(taps)]
        met.append([(position, tap) for tap, position in enumerate(positions) if 0 <= position < size])
    every = slice(None)
    pairs = tuple(((every, every, y, x), (every, every, i, j)) for y, i in met[0] for x, j in met[1])
    return pairs if 0 < len(pairs) <= _MOST_TAPS else None
