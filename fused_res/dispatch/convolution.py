"""Convolution algorithms that all backends share: ATen's, GEMMs for small feature maps, one for strided projections.

``tap_gemm`` is for outputs of one pixel. On a 1x1 feature map a padded 3x3 kernel overlaps the input with its center
only, but libraries read all nine filter taps. In the last stage of a ResNet on small images the weight dominates the
memory traffic (ResNet-18 on 32x32 images: 33 of 45 MB). The algorithm computes one GEMM per contributing tap, directly
from the channels_last weight; the gradient of all other taps is zero.

``im2col_gemm`` is for outputs of a few pixels, where the weight dominates the traffic as well and ATen reorders it in
every call. The algorithm computes forward and both gradients as GEMMs of the im2col matrix of the input and the
channels_last weight in place, which is a ``(K, taps * C)`` matrix.

``aten_compact`` is for the backward of a strided 1x1 projection. Its input gradient is zero but for the strided
positions. ATen writes the zeros, and the addition of the chain's gradient reads them again. The algorithm computes the
gradient at the strided positions only, as that of a convolution with stride 1, and the block adds it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_res import _extension
from fused_res.dispatch import Algorithm, Problem, Rule
from fused_res.ops.geometry import Geometry, conv_output_sizes
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format

OutputMask = Sequence[bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def aten_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    """Return ``conv(input, weight) + bias`` of shape ``(N, K, ...)`` by ATen, and None for the partial statistics.

    Args:
        input: ``(N, C, ...)``.
        weight: ``(K, C / groups, ...)``.
        bias: ``(K,)`` or None.
        geometry: stride, padding, dilation and groups.
        partials: whether partial statistics of the output are requested; this algorithm returns none.
    """
    # torch.convolution is aten.convolution with half the call overhead.
    stride, padding, dilation, groups = geometry
    no_output_padding = [0] * len(stride)
    z = torch.convolution(input, weight, bias, stride, padding, dilation, False, no_output_padding, groups)
    return z, None


def aten_conv_bias_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry, relu: bool
) -> Tensor:
    """Return ``act(conv(input, weight) + bias [+ residual])``.

    The epilogue is cuDNN's where it has one for these operands, else in place on the output of ATen's convolution. A
    float32 bias is rounded to the input's dtype, as ATen requires.
    """
    bias = None if bias is None else bias.to(input.dtype)
    channels_last = conv_output_is_channels_last(input, weight)
    input = to_memory_format(input, channels_last)
    residual = None if residual is None else to_memory_format(residual, channels_last)
    if relu and input.is_cuda and input.dtype in (torch.float32, torch.float16) and input.dim() == 4 and input.numel():
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(input, weight, residual, None, bias, *geometry)
    y, _ = aten_forward(input, weight, bias, geometry, False)
    return to_memory_format(apply_epilogue_(y, residual, relu), channels_last)


def apply_epilogue_(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add the residual to `output` and apply the ReLU, in place."""
    if residual is not None:
        output.add_(residual)
    return output.relu_() if relu else output


def aten_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: OutputMask
) -> Gradients:
    """Return the gradients of input, weight and bias by ATen, None where not requested.

    Args:
        grad: gradient ``(N, K, ...)`` with respect to the output.
        input: the forward input; only its shape is read unless ``output_mask[1]``.
        weight, bias, geometry: as of :func:`aten_forward`.
        output_mask: which of the three gradients are requested.
    """
    if _extension.loaded:
        bias_size = None if bias is None else bias.shape[0]
        return _extension.cpp.convolution_backward(grad, input, weight, bias_size, *geometry, output_mask)
    *sizes, groups = geometry
    biases = None if bias is None else [bias.shape[0]]
    return torch.ops.aten.convolution_backward.default(
        grad, input, weight, biases, *sizes, False, [0] * len(sizes[0]), groups, output_mask
    )


ATEN = Algorithm(
    "aten",
    unsupported_reason=lambda problem: None,
    implementations={
        "inference": aten_conv_bias_act,
        "forward": aten_forward,
        "input_gradient": aten_backward,
        "weight_gradient": aten_backward,
    },
)


# tap_gemm: one GEMM per contributing filter tap


def tap_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    """Compute a forward convolution with one output pixel per image; signature of :func:`aten_forward`."""
    # For a handful of images, the weight as the first operand is twice as fast as the transposed GEMM.
    (pixel, tap), *more = _contributing_taps(input, weight, geometry)
    columns = torch.mm(weight[tap], input[pixel].t())
    for pixel, tap in more:
        columns.addmm_(weight[tap], input[pixel].t())
    z = columns.t().contiguous()
    if bias is not None:
        z += bias
    return z[:, :, None, None], None


def tap_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: OutputMask
) -> Gradients:
    """Compute the gradients of :func:`tap_forward`; signature of :func:`aten_backward`."""
    dz = grad.flatten(1)
    grad_input = torch.zeros_like(input) if output_mask[0] else None
    grad_weight = torch.zeros_like(weight) if output_mask[1] else None
    for pixel, tap in _contributing_taps(input, weight, geometry):
        if grad_input is not None:
            grad_input[pixel] = torch.mm(dz, weight[tap])
        if grad_weight is not None:
            torch.mm(dz.t(), input[pixel], out=grad_weight[tap])
    return grad_input, grad_weight, dz.sum(0) if output_mask[2] else None


Index = tuple[slice, slice, int, int]


def _contributing_taps(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[tuple[Index, Index], ...]:
    return _contributing_taps_of_shape(input.shape[2:], weight.shape[2:], geometry)


@lru_cache(maxsize=1024)
def _contributing_taps_of_shape(
    sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry
) -> tuple[tuple[Index, Index], ...]:
    """Return the pairs of input pixel and filter tap that contribute to a single output pixel.

    Returns an empty tuple for outputs of more than one pixel.
    """
    _, padding, dilation, _ = geometry
    if any(size != 1 for size in conv_output_sizes(sizes, kernel, *geometry[:3])):
        return ()
    overlaps = []
    for size, taps, pad, spacing in zip(sizes, kernel, padding, dilation, strict=True):
        positions = [tap * spacing - pad for tap in range(taps)]
        overlaps.append([(position, tap) for tap, position in enumerate(positions) if 0 <= position < size])
    every = slice(None)
    return tuple(((every, every, y, x), (every, every, i, j)) for y, i in overlaps[0] for x, j in overlaps[1])


def _gemm_unsupported_reason(problem: Problem) -> str | None:
    if problem.under_torch_dispatch:
        return "a dispatch mode or a tensor subclass requires ATen's operators"
    if len(problem.weight) != 4 or problem.groups > 1:
        return "GEMMs on the unpacked weight support 2D convolutions without groups only"
    if problem.dtype not in (torch.float32, torch.float64) or not problem.weight_channels_last:
        return "GEMMs on the unpacked weight require float32 or float64 in channels_last memory"
    return None


def _tap_unsupported_reason(problem: Problem) -> str | None:
    if reason := _gemm_unsupported_reason(problem):
        return reason
    if max(problem.input[2:]) > 2:
        return "feature maps of more than 2x2 pixels"
    pairs = _contributing_taps_of_shape(problem.input[2:], problem.weight[2:], problem.geometry)
    return None if pairs else "more than one output pixel per image"


#: Elements of a single image up to which ATen's convolution is im2col and one GEMM (use_mkldnn in ATen's
#: Convolution.cpp); beyond them, or for more images, it calls oneDNN, which reorders the weight in every call.
_ATEN_GEMM_ELEMENTS = 20480


def is_small_image(problem: Problem) -> bool:
    """Return whether the input is one image so small that ATen computes its convolution by one GEMM."""
    is_gemm = problem.device == "cpu" and problem.groups == 1 and max(problem.weight[2:]) <= 3
    return is_gemm and problem.input[0] == 1 and math.prod(problem.input) <= _ATEN_GEMM_ELEMENTS


_ATEN_GEMM = Rule(
    lambda problem: is_small_image(problem) and problem.pointwise,
    "one small image, whose 1x1 convolution is one GEMM in ATen, too",
    "2 Zen 4 cores, float32, us of ATen / tap_gemm or im2col_gemm with weights out of the L2 cache: 440->440 channels,"
    " 1 pixel: 23 / 32; 960->160, 1 pixel: 17 / 27; 208->208, 4 pixels: 18 / 37; two images: 135 / 50, 96 / 42, 102 /"
    " 46",
    ("forward",),
)

#: With more contributing taps, ATen's single call is assumed to be faster than the GEMMs.
_MAX_TAPS = 4

TAP_GEMM = Algorithm(
    "tap_gemm",
    unsupported_reason=_tap_unsupported_reason,
    implementations={"forward": tap_forward, "input_gradient": tap_backward, "weight_gradient": tap_backward},
    rules=(
        Rule(
            lambda problem: (
                len(_contributing_taps_of_shape(problem.input[2:], problem.weight[2:], problem.geometry)) > _MAX_TAPS
            ),
            f"more than {_MAX_TAPS} taps overlap the input",
            "not measured",
        ),
        _ATEN_GEMM,
    ),
    special_case=True,
    selection_reason=lambda problem: "one output pixel: reads only the taps that overlap the input",
)


# im2col_gemm: explicit im2col and one GEMM


def im2col_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, None]:
    """Compute a forward convolution; signature of :func:`aten_forward`."""
    output = conv_output_sizes(input.shape[2:], weight.shape[2:], *geometry[:3])
    columns = _im2col(input, weight, geometry, output)
    z = torch.mm(_weight_matrix(weight), columns.t()).t().contiguous()
    if bias is not None:
        z += bias
    return z.view(input.shape[0], *output, -1).permute(0, 3, 1, 2), None


def im2col_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: OutputMask
) -> Gradients:
    """Compute the gradients of :func:`im2col_forward`; signature of :func:`aten_backward`."""
    dz = grad.permute(0, 2, 3, 1).flatten(0, 2)
    images, channels, height, width = input.shape
    outputs, _, *taps = weight.shape
    output = grad.shape[2:]
    grad_input = grad_weight = None
    if output_mask[0]:
        grad_columns = torch.mm(dz, _weight_matrix(weight)).view(images, *output, *taps, channels)
        (stride_h, stride_w), (pad_h, pad_w), dilation, _ = geometry
        padded = input.new_zeros(images, height + 2 * pad_h, width + 2 * pad_w, channels)
        for i in range(taps[0]):
            for j in range(taps[1]):
                y, x = i * dilation[0], j * dilation[1]
                end = y + (output[0] - 1) * stride_h + 1, x + (output[1] - 1) * stride_w + 1
                padded[:, y : end[0] : stride_h, x : end[1] : stride_w] += grad_columns[:, :, :, i, j]
        grad_input = padded[:, pad_h : pad_h + height, pad_w : pad_w + width].contiguous().permute(0, 3, 1, 2)
    if output_mask[1]:
        columns = _im2col(input, weight, geometry, output)
        grad_weight = torch.mm(dz.t(), columns).view(outputs, *taps, channels).permute(0, 3, 1, 2)
    return grad_input, grad_weight, dz.sum(0) if output_mask[2] else None


def _weight_matrix(weight: Tensor) -> Tensor:
    """Return a channels_last weight as a ``(K, taps * C)`` matrix, without a copy."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _im2col(input: Tensor, weight: Tensor, geometry: Geometry, output: Sequence[int]) -> Tensor:
    """Return the im2col matrix ``(output pixels, taps * C)``."""
    (stride_h, stride_w), (pad_h, pad_w), dilation, _ = geometry
    taps = weight.shape[2:]
    padded = F.pad(input, (pad_w, pad_w, pad_h, pad_h)) if pad_h or pad_w else input
    image, channel, row, col = padded.stride()
    windows = padded.as_strided(
        (input.shape[0], *output, *taps, input.shape[1]),
        (image, row * stride_h, col * stride_w, row * dilation[0], col * dilation[1], channel),
    )
    return windows.flatten(3).flatten(0, 2)


def _im2col_unsupported_reason(problem: Problem) -> str | None:
    if reason := _gemm_unsupported_reason(problem):
        return reason
    if problem.device != "cpu" or not problem.channels_last or problem.input[0] == 0:
        return "im2col_gemm supports channels_last images on a CPU only"
    height, width = problem.output_size
    return "one output pixel per image" if height * width == 1 else None


#: `im2col_gemm` is faster from this number of weight elements on, and up to this number of output pixels of all images.
_MIN_WEIGHT_ELEMENTS = 1 << 15
_MAX_OUTPUT_PIXELS, _MAX_OUTPUT_PIXELS_1X1 = 32, 127


def _has_many_pixels(problem: Problem) -> bool:
    height, width = problem.output_size
    limit = _MAX_OUTPUT_PIXELS_1X1 if set(problem.weight[2:]) == {1} else _MAX_OUTPUT_PIXELS
    return problem.input[0] * height * width > limit


def _has_small_weight(problem: Problem) -> bool:
    outputs, channels, *taps = problem.weight
    return outputs * channels * taps[0] * taps[1] < _MIN_WEIGHT_ELEMENTS


_EVIDENCE_MANY_PIXELS = (
    "2 Zen 4 cores, float32, forward and backward, ms of ATen / im2col_gemm: 3x3, 512->512 channels, 16 pixels: 12.5 /"
    " 6.6; 3x3, 256->256, 64 pixels: 2.3 / 2.5; 1x1, 2048->512, 16 pixels: 4.9 / 2.0; 1x1, 256->1024, 64 pixels: 1.16 /"
    " 0.97"
)

IM2COL_GEMM = Algorithm(
    "im2col_gemm",
    unsupported_reason=_im2col_unsupported_reason,
    implementations={"forward": im2col_forward, "input_gradient": im2col_backward, "weight_gradient": im2col_backward},
    rules=(
        Rule(_has_small_weight, "a small weight", "not measured: the smallest measured weight has 262144 elements"),
        Rule(_has_many_pixels, "many output pixels", _EVIDENCE_MANY_PIXELS),
        _ATEN_GEMM,
    ),
    special_case=True,
    selection_reason=lambda problem: "few output pixels: reads the weight once, without reordering",
)

# aten_compact: the input gradient of a strided projection without its zeros


def compact_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_mask: OutputMask
) -> Gradients:
    """Compute the gradients with a compact input gradient, of the output's size; signature of :func:`aten_backward`."""
    stride, padding, dilation, groups = geometry
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        strided = input[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]  # for its shape
        dense = (1,) * len(stride), padding, dilation, groups
        grad_input, _, _ = aten_backward(grad, strided, weight, bias, dense, (True, False, False))
    if output_mask[1] or output_mask[2]:
        _, grad_weight, grad_bias = aten_backward(grad, input, weight, bias, geometry, (False, *output_mask[1:]))
    return grad_input, grad_weight, grad_bias


def _compact_unsupported_reason(problem: Problem) -> str | None:
    strided = problem.projection and problem.pointwise and max(problem.stride) > 1
    return None if strided else "only strided 1x1 projections have a compact input gradient"


ATEN_COMPACT = Algorithm(
    "aten_compact",
    unsupported_reason=_compact_unsupported_reason,
    implementations={"input_gradient": compact_backward, "weight_gradient": compact_backward},
    rules=(Rule(lambda problem: problem.device == "cpu", "not faster on a CPU", "not measured on a CPU"),),
    special_case=True,
    compact_input_gradient=True,
    selection_reason=lambda problem: "a strided projection: its input gradient without the zeros",
)

#: Every backend's list is its own algorithms followed by these.
ALGORITHMS = (IM2COL_GEMM, TAP_GEMM, ATEN_COMPACT, ATEN)
