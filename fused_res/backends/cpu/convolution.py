"""The convolution algorithms of the CPU, in the order in which they are tried.

Ours are for float32 images in channels_last memory, without groups: Winograd's F(4x4, 3x3) and F(2x2, 3x3) for 3x3
kernels with stride 1 or 2 (``csrc/cpu/isa/winograd.h``; Lavin & Gray 2016, https://arxiv.org/abs/1509.09308) and a
direct GEMM for all others (``direct.h``). Then oneDNN with its epilogue, then ATen.

There are two sets of rules because there are two questions. In inference a weight is packed once, and the number of
multiply-adds decides. In training it is packed in every step, there are gradients, and fresh memory costs as much as
the arithmetic: there the rules are what measured faster than ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fused_res import _extension
from fused_res.backends.cpu import onednn
from fused_res.backends.cpu.operators import conv_weight_gradient, convolve, pack_conv_weight
from fused_res.dispatch import TRAINING, Algorithm, Operation, PackedWeight, Problem, Rule, convolution
from fused_res.dispatch.convolution import Gradients, Mask
from fused_res.ops.geometry import Geometry

#: Outputs a side of an algorithm's tiles; 0: no transform.
TILES = {"winograd_f4x4": 4, "winograd_f2x2": 2, "direct": 0}


def pack(weight: Tensor, tile: int, stride: Sequence[int], transposed: bool = False) -> Tensor:
    """The weight as a kernel reads it; both of Winograd's tile sizes read the same form."""
    packed: Tensor = pack_conv_weight(weight, stride[0] if tile else 0, transposed)
    return packed


def _run(
    tile: int,
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight: Sequence[int],
    geometry: Geometry,
    residual: Tensor | None = None,
    relu: bool = False,
    partials: bool = False,
) -> tuple[Tensor, Tensor]:
    """One call of the C++ operator, with a packed weight of shape ``weight``."""
    bias = None if bias is None else bias.contiguous()
    output, statistics = convolve(
        input, packed, bias, residual, weight[0], weight[2:], *geometry[:3], tile, relu, partials
    )
    return output, statistics


def _inference(
    tile: int,
    input: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    return _run(tile, input, weight.tensor, bias, weight.shape, geometry, residual, relu)[0]


def _forward(
    tile: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, Tensor]:
    packed = pack(weight, tile, geometry[0])
    return _run(tile, input, packed, bias, weight.shape, geometry, partials=partials)


def _backward(
    tile: int, grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, mask: Mask
) -> Gradients:
    stride, padding, dilation, groups = geometry
    dx = dweight = dbias = None
    if mask[0]:
        # A convolution of the flipped and transposed weight: with stride 1, or of the pixels that a 1x1 read.
        taps = weight.shape[2:]
        around = tuple(spread * (tap - 1) - pad for tap, pad, spread in zip(taps, padding, dilation, strict=True))
        transposed, geometry = (input.shape[1], weight.shape[0], *taps), ((1, 1), around, dilation, groups)
        # Packed in the call: the weight's other form is freed before its gradient is allocated.
        dx, _ = _run(tile, grad, pack(weight, tile, stride, transposed=True), None, transposed, geometry)
    if mask[1]:
        dweight = conv_weight_gradient(grad, input, weight, stride, padding, dilation, tile > 0)
    if mask[2]:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


# What the kernels compute


def _supports(problem: Problem) -> str | None:
    if problem.traced:
        return "a dispatch mode or a tensor subclass sees ATen's operators only"
    if problem.dtype != torch.float32 or not problem.channels_last or len(problem.weight) != 4:
        return "the CPU's own convolutions are for float32 images in channels_last memory"
    if problem.operation == "inference" and 0 in problem.input:
        return "an empty batch"
    if problem.groups > 1:
        return "grouped"
    return "the CPU's own convolutions need AVX2" if problem.machine.isa == "baseline" else None


def _winograd_supports(problem: Problem) -> str | None:
    if reason := _supports(problem):
        return reason
    if not _extension.cpp.winograd_supports(problem.weight[2:], problem.stride, problem.dilation):
        return _shape(problem)
    if not problem.winograd:
        return "Winograd is switched off"
    if problem.operation == "input_gradient" and (problem.stride != (1, 1) or max(problem.padding) > 2):
        return "the input gradient is a convolution with stride 1 and padding 2 - p"
    return None


def _direct_supports(problem: Problem) -> str | None:
    if reason := _supports(problem):
        return reason
    if problem.operation != "input_gradient" or problem.pointwise:
        return None
    around = zip(problem.weight[2:], problem.padding, problem.dilation, strict=True)
    if problem.stride != (1, 1) or any(spread * (taps - 1) < pad for taps, pad, spread in around):
        return "the input gradient of a strided kernel larger than 1x1"
    return None


def _shape(problem: Problem) -> str:
    size, stride = "x".join(map(str, problem.weight[2:])), max(problem.stride)
    return f"{size}{f', stride {stride}' * (stride > 1)}{', dilated' * (max(problem.dilation) > 1)}: one GEMM"


# Inference: the fewest multiply-adds

#: Costs in multiply-adds of one output or input channel each: to read one weight element, to pack it for the direct
#: GEMM, to transform and pack it for Winograd, and to transform one element of an input or output tile.
_READ, _PACK_DIRECT, _PACK_WINOGRAD, _TRANSFORM = 10, 60, 100, 8


@lru_cache(maxsize=4096)
def _costs(problem: Problem) -> dict[int, float]:
    """Multiply-adds for each pair of an input and an output channel, by tile size."""
    images, channels, *_ = problem.input
    outputs, _, *taps = problem.weight
    height, width = problem.output
    count = taps[0] * taps[1]
    costs: dict[int, float] = {0: count * (images * height * width + _READ + (0 if problem.packed else _PACK_DIRECT))}
    for tile in (4, 2):
        products = images * _extension.cpp.winograd_gemm_rows(height, width, tile, problem.stride[0])
        transforms = products * _TRANSFORM * (1 / channels + 1 / outputs)
        packing = 0 if problem.packed else _extension.cpp.WINOGRAD_POINTS * _PACK_WINOGRAD
        costs[tile] = products + transforms + (tile + 2) ** 2 * _READ + packing
    return costs


def _f4x4_costs_more(problem: Problem) -> bool:
    costs = _costs(problem)
    return costs[4] >= costs[0] or costs[4] > costs[2]


def _f2x2_costs_more(problem: Problem) -> bool:
    costs = _costs(problem)
    return costs[2] >= costs[0]


_COUNTED = "counted: multiply-adds, and those that reading and transforming the weight costs"
_TOO_FEW = "too few pixels or channels to pay for Winograd's transforms and larger weight"

# Training: what measured faster than ATen

#: The weight gradient of a 1x1 with stride 1 and more than 128 channels is faster by itself, but not in a step of
#: ResNet-50: 1.80 s at best with ATen's, 1.89 s with ours. The forward of a 1x1 returns the statistics as well.
_MEASURED = (
    "2 Zen 4 cores, AVX-512, the shapes of ResNet-18 and ResNet-50 at batch 16; ms of ATen, ours, for forward, input"
    " gradient, weight gradient: 3x3 by Winograd 17-19, 7-13; 16-17, 6-11; 17-36, 8-11. 3x3, stride 2 9-19, 6-13; no"
    " kernel; 12-28, 9-17. 1x1 8-22, 9-19; 9-30, 8-17; 10-25, 10-21. 7x7, over 32 MB 33, 24; no kernel; a tie"
)
#: Fewer channels leave a part of every instruction idle.
_LEAST_CHANNELS = 16
#: Output pixels from which the larger weight of Winograd is worth its transform, made in every step.
_LEAST_PIXELS = 128
#: Elements of a float32 tensor of 32 MB. The C library maps a larger one anew every time, and its page faults take as
#: long as a 1x1 convolution; our outputs come from a cache.
_LARGE = 1 << 23


def _output_pixels(problem: Problem) -> int:
    return problem.input[0] * math.prod(problem.output)


def _channels(problem: Problem) -> int:
    return min(problem.weight[:2])


def _beaten_forward(problem: Problem) -> bool:
    return not _wide_pointwise(problem) and _output_pixels(problem) * problem.weight[0] <= _LARGE


def _beaten_input_gradient(problem: Problem) -> bool:
    small = math.prod(problem.input) <= _LARGE or problem.stride != (1, 1)
    return not _wide_pointwise(problem) and small


def _wide_pointwise(problem: Problem) -> bool:
    return problem.pointwise and _channels(problem) >= _LEAST_CHANNELS


def _beaten_weight_gradient(problem: Problem) -> bool:
    channels, taps = problem.weight[1], problem.weight[2:]
    return max(taps) > 3 or channels < _LEAST_CHANNELS or (problem.stride == (1, 1) and channels > 128)


_FEW_PIXELS = Rule(
    lambda problem: _output_pixels(problem) < _LEAST_PIXELS, "few output pixels", _MEASURED, TRAINING
)  # fmt: skip
_MEMORY = "ATen is as fast where the output fits its allocator's caches"


def _ours(
    name: str,
    supports: Callable[[Problem], str | None],
    rules: tuple[Rule, ...],
    training: bool,
    describe: Callable[[Problem], str],
) -> Algorithm:
    tile = TILES[name]
    serves: dict[Operation, Callable[..., Any] | str] = {"inference": partial(_inference, tile)}
    if training:
        gradient = partial(_backward, tile)
        serves |= {"forward": partial(_forward, tile), "input_gradient": gradient, "weight_gradient": gradient}
    form = "winograd" if tile else "direct"
    return Algorithm(
        name, supports, serves, rules, describe, statistics=True, compact=True, packs="always",
        pack=lambda problem, input, weight: pack(weight, tile, problem.stride), pack_key=lambda problem: form,
    )  # fmt: skip


WINOGRAD_F4X4 = _ours(
    "winograd_f4x4",
    _winograd_supports,
    (
        Rule(_f4x4_costs_more, _TOO_FEW, _COUNTED, ("inference",)),
        _FEW_PIXELS,
        Rule(lambda problem: _channels(problem) < _LEAST_CHANNELS, "few channels", _MEASURED, TRAINING),
    ),
    True,
    lambda problem: f"{_costs(problem)[0] / _costs(problem)[4]:.1f}x fewer operations",
)
WINOGRAD_F2X2 = _ours(
    "winograd_f2x2",
    _winograd_supports,
    (Rule(_f2x2_costs_more, _TOO_FEW, _COUNTED),),
    False,
    lambda problem: "a small image: reads less of the weight than F(4x4)",
)
DIRECT = _ours(
    "direct",
    _direct_supports,
    (
        _FEW_PIXELS,
        Rule(_beaten_forward, _MEMORY, _MEASURED, ("forward",)),
        Rule(_beaten_input_gradient, _MEMORY, _MEASURED, ("input_gradient",)),
        Rule(_beaten_weight_gradient, "ATen's weight gradient measured as fast", _MEASURED, ("weight_gradient",)),
    ),
    True,
    lambda problem: "",
)
ONEDNN = Algorithm(
    "onednn",
    supports=onednn.supports,
    serves={"inference": onednn.conv_bias_act},
    rules=(
        Rule(
            lambda problem: not problem.packed and problem.input[0] == 1,
            "one image, and a weight that is not kept packed",
            "taken over from the rule before it, which recorded no figures",
        ),
    ),
    pack=onednn.pack,
    pack_key=lambda problem: ("onednn", problem.input, problem.dtype, torch.get_num_threads()),
    packs="kept",
)
ALGORITHMS = (WINOGRAD_F4X4, WINOGRAD_F2X2, DIRECT, ONEDNN, *convolution.ALGORITHMS)
