"""The convolutions that every backend's list ends with: ATen's, and two GEMM algorithms for outputs of few pixels.

On a map of 1x1 pixels a padded 3x3 kernel meets the input with its centre alone, and a library still reads all nine
taps of the weight. In the last stage of a ResNet on small images the weight *is* the memory traffic (ResNet-18 on
32x32 images: 33 of 45 MB). There ``tap_gemm`` computes one GEMM for each tap that meets the input, straight from the
channels_last weight; the gradient of the other taps is zero.

With a few pixels the weight dominates as well, and ATen reorders it in every call. There ``im2col_gemm`` computes all
three products from the weight as it lies in memory, a matrix of output channels and taps, and from the im2col matrix
of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_res.dispatch import Algorithm, Problem, Rule
from fused_res.ops.geometry import Geometry, conv_output_sizes
from fused_res.ops.memory_format import laid_out, makes_channels_last

Mask = Sequence[bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    """``conv(input, weight) + bias``: ``(N, C, ...)`` and ``(K, C / groups, ...)`` to ``(N, K, ...)``."""
    # torch.convolution is aten.convolution with half the call overhead.
    stride, padding, dilation, groups = geometry
    no_output_padding = [0] * len(stride)
    z = torch.convolution(input, weight, bias, stride, padding, dilation, False, no_output_padding, groups)
    return z, None


def bias_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """``act(conv(input, weight) + bias [+ residual])`` by ATen: cuDNN's epilogue, or in place on its output."""
    channels_last = makes_channels_last(input, weight)
    input = laid_out(input, channels_last)
    residual = None if residual is None else laid_out(residual, channels_last)
    if relu and input.is_cuda and input.dtype in (torch.float32, torch.float16) and input.dim() == 4 and input.numel():
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(input, weight, residual, None, bias, *geometry)
    y, _ = forward(input, weight, bias, geometry, False)
    return laid_out(finish_in_place(y, residual, relu), channels_last)


def finish_in_place(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        output.add_(residual)
    return output.relu_() if relu else output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: Mask
) -> Gradients:
    """Gradients of input, weight and bias; of ``input`` only the shape is read unless ``output_mask[1]``."""
    *sizes, groups = geometry
    biases = None if bias is None else [bias.shape[0]]
    return torch.ops.aten.convolution_backward.default(
        grad, input, weight, biases, *sizes, False, [0] * len(sizes[0]), groups, output_mask
    )


ATEN = Algorithm(
    "aten",
    supports=lambda problem: None,
    serves={"inference": bias_act, "forward": forward, "input_gradient": backward, "weight_gradient": backward},
)


# One GEMM a tap


def tap_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    # The weight first: for a handful of images twice as fast as the other way round.
    (pixel, tap), *more = _taps_of(input, weight, geometry)
    columns = torch.mm(weight[tap], input[pixel].t())
    for pixel, tap in more:
        columns.addmm_(weight[tap], input[pixel].t())
    z = columns.t().contiguous()
    if bias is not None:
        z += bias
    return z[:, :, None, None], None


def tap_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: Mask
) -> Gradients:
    dz = grad.flatten(1)
    grad_input = torch.zeros_like(input) if output_mask[0] else None
    grad_weight = torch.zeros_like(weight) if output_mask[1] else None
    for pixel, tap in _taps_of(input, weight, geometry):
        if grad_input is not None:
            grad_input[pixel] = torch.mm(dz, weight[tap])
        if grad_weight is not None:
            torch.mm(dz.t(), input[pixel], out=grad_weight[tap])
    return grad_input, grad_weight, dz.sum(0) if output_mask[2] else None


Index = tuple[slice, slice, int, int]


def _taps_of(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[tuple[Index, Index], ...]:
    return _taps(input.shape[2:], weight.shape[2:], geometry)


@lru_cache(maxsize=1024)
def _taps(sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> tuple[tuple[Index, Index], ...]:
    """Pairs of an input pixel and the tap that meets it, for an output of one pixel; empty for other outputs."""
    _, padding, dilation, _ = geometry
    if any(size != 1 for size in conv_output_sizes(sizes, kernel, *geometry[:3])):
        return ()
    met = []
    for size, taps, pad, spread in zip(sizes, kernel, padding, dilation, strict=True):
        positions = [tap * spread - pad for tap in range(taps)]
        met.append([(position, tap) for tap, position in enumerate(positions) if 0 <= position < size])
    every = slice(None)
    return tuple(((every, every, y, x), (every, every, i, j)) for y, i in met[0] for x, j in met[1])


def _gemm_supports(problem: Problem) -> str | None:
    if problem.traced:
        return "a dispatch mode or a tensor subclass sees ATen's operators only"
    if len(problem.weight) != 4 or problem.groups > 1:
        return "GEMMs on the weight in memory are for images without groups"
    if problem.dtype not in (torch.float32, torch.float64) or not problem.weight_channels_last:
        return "GEMMs on the weight in memory read float32 or float64 in channels_last memory"
    return None


def _tap_supports(problem: Problem) -> str | None:
    if reason := _gemm_supports(problem):
        return reason
    if max(problem.input[2:]) > 2:
        return "maps of more than 2x2 pixels"
    pairs = _taps(problem.input[2:], problem.weight[2:], problem.geometry)
    return None if pairs else "more than one output pixel an image"


#: More taps than this and ATen's one call is faster than the products.
_MOST_TAPS = 4

TAP_GEMM = Algorithm(
    "tap_gemm",
    supports=_tap_supports,
    serves={"forward": tap_forward, "input_gradient": tap_backward, "weight_gradient": tap_backward},
    rules=(
        Rule(
            lambda problem: len(_taps(problem.input[2:], problem.weight[2:], problem.geometry)) > _MOST_TAPS,
            f"more than {_MOST_TAPS} taps meet the input",
            "taken over from the rule before it, which recorded no figures",
        ),
    ),
    niche=True,
    describe=lambda problem: "one output pixel: reads only the taps that meet the input",
)


# im2col and GEMM


def im2col_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    output = conv_output_sizes(input.shape[2:], weight.shape[2:], *geometry[:3])
    columns = _im2col(input, weight, geometry, output)
    z = torch.mm(_matrix(weight), columns.t()).t().contiguous()
    if bias is not None:
        z += bias
    return z.view(input.shape[0], *output, -1).permute(0, 3, 1, 2), None


def im2col_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: Mask
) -> Gradients:
    dz = grad.permute(0, 2, 3, 1).flatten(0, 2)
    images, channels, height, width = input.shape
    outputs, _, *taps = weight.shape
    output = grad.shape[2:]
    grad_input = grad_weight = None
    if output_mask[0]:
        met = torch.mm(dz, _matrix(weight)).view(images, *output, *taps, channels)
        (rows, cols), (high, wide), dilation, _ = geometry
        padded = input.new_zeros(images, height + 2 * high, width + 2 * wide, channels)
        for i in range(taps[0]):
            for j in range(taps[1]):
                y, x = i * dilation[0], j * dilation[1]
                last = y + (output[0] - 1) * rows + 1, x + (output[1] - 1) * cols + 1
                padded[:, y : last[0] : rows, x : last[1] : cols] += met[:, :, :, i, j]
        grad_input = padded[:, high : high + height, wide : wide + width].contiguous().permute(0, 3, 1, 2)
    if output_mask[1]:
        columns = _im2col(input, weight, geometry, output)
        grad_weight = torch.mm(dz.t(), columns).view(outputs, *taps, channels).permute(0, 3, 1, 2)
    return grad_input, grad_weight, dz.sum(0) if output_mask[2] else None


def _matrix(weight: Tensor) -> Tensor:
    """``(K, taps * C)``, as a channels_last weight lies in memory."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _im2col(input: Tensor, weight: Tensor, geometry: Geometry, output: Sequence[int]) -> Tensor:
    """``(pixels, taps * C)``: the input under each output pixel."""
    (rows, cols), (high, wide), dilation, _ = geometry
    taps = weight.shape[2:]
    padded = F.pad(input, (wide, wide, high, high)) if high or wide else input
    image, channel, row, col = padded.stride()
    met = padded.as_strided(
        (input.shape[0], *output, *taps, input.shape[1]),
        (image, row * rows, col * cols, row * dilation[0], col * dilation[1], channel),
    )
    return met.flatten(3).flatten(0, 2)


def _im2col_supports(problem: Problem) -> str | None:
    if reason := _gemm_supports(problem):
        return reason
    if problem.device != "cpu" or not problem.channels_last or problem.input[0] == 0:
        return "im2col_gemm is for images in channels_last memory of a CPU"
    height, width = problem.output
    return "one output pixel an image" if height * width == 1 else None


#: Weight elements from which, and output pixels of all images up to which, `im2col_gemm` is faster.
_LARGE_WEIGHT = 1 << 15
_FEW_PIXELS, _FEW_PIXELS_POINTWISE = 32, 127


def _many_pixels(problem: Problem) -> bool:
    height, width = problem.output
    most = _FEW_PIXELS_POINTWISE if set(problem.weight[2:]) == {1} else _FEW_PIXELS
    return problem.input[0] * height * width > most


def _small_weight(problem: Problem) -> bool:
    outputs, channels, *taps = problem.weight
    return outputs * channels * taps[0] * taps[1] < _LARGE_WEIGHT


_FEW_PIXELS_MEASURED = (
    "2 Zen 4 cores, float32, forward and backward, ATen and im2col_gemm in ms: 512 to 512 channels, 3x3, 16 pixels 12.5"
    " and 6.6; 256 to 256, 64 pixels 2.3 and 2.5; 2048 to 512, 1x1, 16 pixels 4.9 and 2.0; 256 to 1024, 64 pixels 1.16"
    " and 0.97"
)

IM2COL_GEMM = Algorithm(
    "im2col_gemm",
    supports=_im2col_supports,
    serves={"forward": im2col_forward, "input_gradient": im2col_backward, "weight_gradient": im2col_backward},
    rules=(
        Rule(_small_weight, "a small weight", _FEW_PIXELS_MEASURED),
        Rule(_many_pixels, "many output pixels", _FEW_PIXELS_MEASURED),
    ),
    niche=True,
    describe=lambda problem: "few output pixels: reads the weight once, as it lies in memory",
)

#: In every backend's list these follow the backend's own.
ALGORITHMS = (IM2COL_GEMM, TAP_GEMM, ATEN)
