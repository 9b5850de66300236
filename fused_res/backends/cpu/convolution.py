"""The CPU backend's convolution algorithms and selection rules, in the order in which they are tried.

This library's implementations support inputs ``(N, C, H, W)`` in channels_last memory, without groups: Winograd
F(4x4, 3x3) and F(2x2, 3x3) for 3x3 filters with stride 1 or 2 (``csrc/cpu/isa/winograd.h``; Lavin & Gray 2015,
https://arxiv.org/abs/1509.09308), and ``direct``, blocked im2col and GEMM, for filters of any size
(``csrc/cpu/isa/direct.h``). ``direct`` performs the multiply-adds of the definition; it is not oneDNN's algorithm of
that name, which has no im2col. These compute in float32; in inference the tensors may be bfloat16 or float16. With the
instruction sets avx512_bf16 and amx, ``direct_bf16`` multiplies bfloat16 and accumulates in float32
(``csrc/cpu/isa/direct_bf16.h``). After them come oneDNN with a fused epilogue, and ATen.

Inference and training have separate rules. In inference a weight is packed once, and the number of multiply-adds
decides. In training the weight is packed in every step, gradients are computed, and page faults on newly mapped memory
take as long as the arithmetic, so the rules select the shapes for which these implementations were measured to be
faster than ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res import _extension
from fused_res.backends import implicit_gemm
from fused_res.backends.cpu import onednn
from fused_res.backends.cpu.operators import conv_backward, convolve, pack_conv_weight
from fused_res.dispatch import TRAINING_OPERATIONS, Algorithm, Operation, PackedWeight, Problem, Rule, convolution
from fused_res.dispatch.convolution import Gradients, OutputMask
from fused_res.ops.geometry import Geometry


class Kernel(NamedTuple):
    """The C++ kernels of an algorithm.

    Args:
        tile: output tile size m of the Winograd algorithm F(m x m, 3x3); 0 for a direct convolution.
        bf16_products: whether bfloat16 is multiplied, instead of float32.
    """

    tile: int
    bf16_products: bool = False


#: The algorithms with C++ kernels.
KERNELS = {
    "winograd_f4x4": Kernel(4),
    "winograd_f2x2": Kernel(2),
    "direct_bf16": Kernel(0, True),
    "direct": Kernel(0),
}


def pack(weight: Tensor, kernel: Kernel, stride: Sequence[int], resident: bool = False) -> Tensor:
    """Return the packed weight, as bfloat16 or float32; `resident` if many calls will read it.

    F(2x2) uses a subset of the interpolation points of F(4x4), so both read the same transformed filter U.
    """
    tile, bf16_products = kernel
    packed: Tensor = pack_conv_weight(weight, stride[0] if tile else 0, False, bf16_products, resident)
    return packed


def _run(
    kernel: Kernel,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    geometry: Geometry,
    residual: Tensor | None = None,
    relu: bool = False,
    partials: bool = False,
    input_stats: Tensor | None = None,
    input_relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Call the C++ operator with a weight, packed or not; `shape` is that of the unpacked weight."""
    bias = None if bias is None else bias.contiguous()
    output, statistics = convolve(
        input, weight, bias, residual, shape[0], shape[2:], *geometry[:3], kernel.tile, relu, partials,
        kernel.bf16_products, input_stats, input_relu,
    )  # fmt: skip
    return output, statistics


def _inference(
    kernel: Kernel,
    input: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    return _run(kernel, input, weight.tensor, bias, weight.shape, geometry, residual, relu)[0]


def _forward(
    kernel: Kernel, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, partials: bool
) -> tuple[Tensor, Tensor]:
    return _run(kernel, input, weight, bias, weight.shape, geometry, partials=partials)


def normalize_and_convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_stats: Tensor | None,
    input_relu: bool,
    geometry: Geometry,
    partials: bool,
) -> tuple[Tensor, Tensor]:
    """Compute ``conv_bn_stats`` by a direct convolution; the norm runs on chunks of pixels that stay in L2."""
    kernel = KERNELS["direct_bf16" if input.dtype == torch.bfloat16 else "direct"]
    return _run(
        kernel, input, weight, bias, weight.shape, geometry, partials=partials,
        input_stats=input_stats, input_relu=input_relu,
    )  # fmt: skip


def _backward(
    kernel: Kernel,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    mask: OutputMask,
) -> Gradients:
    dx = dweight = None
    dbias = grad.sum((0, 2, 3)) if mask[2] else None
    if mask[0] or mask[1]:
        no_norms = None, None, None, False, None, 0, weight, input, None, False, None, None
        dx, _, dweight = conv_backward(grad, *no_norms, *geometry[:3], mask[:2], kernel.tile)
    return dx if mask[0] else None, dweight if mask[1] else None, dbias


# Supported problems


def _unsupported_reason(problem: Problem) -> str | None:
    if problem.under_torch_dispatch:
        return "a dispatch mode or a tensor subclass requires ATen's operators"
    if not problem.channels_last or len(problem.weight) != 4:
        return "the CPU backend's convolutions support (N, C, H, W) in channels_last memory only"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "the CPU backend's convolutions support float32, bfloat16 and float16"
    if problem.operation == "inference" and 0 in problem.input:
        return "empty batch"
    if problem.groups > 1:
        return "grouped convolution"
    return "the CPU backend's convolutions require AVX2" if problem.machine.isa == "baseline" else None


def _fp32_unsupported_reason(problem: Problem) -> str | None:
    """Return why convolutions in float32 arithmetic do not support a problem."""
    if problem.operation != "inference" and problem.dtype != torch.float32:
        return "in training, convolutions in float32 arithmetic support float32 only"
    return _unsupported_reason(problem)


def _is_winograd_shape(problem: Problem) -> bool:
    supported: bool = _extension.cpp.winograd_supports(problem.weight[2:], problem.stride, problem.dilation)
    return supported


def _bf16_unsupported_reason(problem: Problem) -> str | None:
    if reason := _unsupported_reason(problem):
        return reason
    if problem.dtype != torch.bfloat16:
        return "products of bfloat16 are for bfloat16 only"
    if problem.weight[1] <= _extension.cpp.PIXEL_CHANNELS and problem.dilation[1] > 1:
        return "products of bfloat16 do not support dilated filters of images of few channels"
    if problem.machine.isa not in _BF16_MAC_COST:
        return "products of bfloat16 require avx512_bf16 or amx"
    return _bf16_gradient_unsupported_reason(problem)


def _winograd_unsupported_reason(problem: Problem) -> str | None:
    if reason := _fp32_unsupported_reason(problem):
        return reason
    if not _is_winograd_shape(problem):
        return "Winograd requires an undilated 3x3 filter with equal strides of 1 or 2"
    if not problem.allow_winograd:
        return "Winograd is disabled"
    if problem.operation == "input_gradient" and (problem.stride != (1, 1) or max(problem.padding) > 2):
        return "Winograd's input gradient requires stride 1 and padding of at most 2"
    return None


def _direct_unsupported_reason(problem: Problem) -> str | None:
    return _fp32_unsupported_reason(problem) or _direct_gradient_unsupported_reason(problem)


def _fused_bf16_unsupported_reason(problem: Problem) -> str | None:
    if problem.operation != "forward" and problem.pointwise and max(problem.stride) > 1 and not problem.projection:
        return "the fused backward supports 1x1 filters with stride 1 only, except for projections"
    return _bf16_unsupported_reason(problem)


def _fused_fp32_unsupported_reason(problem: Problem) -> str | None:
    if problem.dtype != torch.float32 or not problem.pointwise or max(problem.stride) > 1 or max(problem.padding) > 0:
        return "in float32, only 1x1 convolutions with stride 1 and no padding are fused with norms"
    if problem.operation != "forward" and not _has_split_k_gradient(problem):
        return "a large weight: its gradient has no chunks to fuse the norms with"
    return _direct_unsupported_reason(problem)


def _has_split_k_gradient(problem: Problem) -> bool:
    width, limit = _extension.cpp.PANEL_WIDTH, _extension.cpp.SPLIT_K_MAX_FLOATS
    return math.ceil(problem.weight[0] / width) * width * problem.weight[1] <= limit


def _bf16_gradient_unsupported_reason(problem: Problem) -> str | None:
    has_few_channels = problem.weight[0] <= _extension.cpp.PIXEL_CHANNELS
    if problem.operation == "input_gradient" and not problem.pointwise and has_few_channels:
        return "input gradient of a filter with few output channels"
    return _direct_gradient_unsupported_reason(problem)


def _direct_gradient_unsupported_reason(problem: Problem) -> str | None:
    if problem.operation != "input_gradient" or problem.pointwise:
        return None
    strided = max(problem.stride) > 1
    for size, padding, dilation, stride in zip(
        problem.weight[2:], problem.padding, problem.dilation, problem.stride, strict=True
    ):
        if padding > dilation * (size - 1) or stride > size or (strided and dilation > 1):
            return "input gradient of a filter smaller than its padding or its stride, or of a dilated strided one"
    return None


def _describe_direct(problem: Problem) -> str:
    if _is_winograd_shape(problem):
        return ""  # the plan prints why Winograd was passed over
    size, stride = "x".join(map(str, problem.weight[2:])), max(problem.stride)
    return f"{size}{f', stride {stride}' * (stride > 1)}{', dilated' * (max(problem.dilation) > 1)}: one GEMM"


# Inference rules: the fewest multiply-adds

#: Costs, in multiply-adds of float32, of reading one weight element of 4 bytes, packing it for ``direct``, transforming
#: and packing it for Winograd, and transforming one element of an input or output tile (per input or output channel).
#: They are ratios of bandwidth and arithmetic, measured with 32 MB of L3: a network's weights are read from memory.
_READ_COST, _PACK_DIRECT_COST, _PACK_WINOGRAD_COST, _TRANSFORM_COST = 10, 60, 100, 8
#: Cost of a multiply-add of bfloat16, by instruction set: vdpbf16ps has twice the rate of fp32 FMAs on Zen 4, and the
#: tiles of amx 16 times the rate.
_BF16_MAC_COST = {"avx512_bf16": 1 / 2, "amx": 1 / 16, "amx_emulated": 1 / 16}


@lru_cache(maxsize=4096)
def _modelled_costs(problem: Problem) -> dict[str, float]:
    """Return the modelled cost, in multiply-adds of float32, per (input channel, output channel) pair.

    The keys are the algorithms that support the problem.
    """
    batch, channels, *_ = problem.input
    out_channels, _, *kernel_size = problem.weight
    height, width = problem.output_size
    taps = kernel_size[0] * kernel_size[1]
    costs: dict[str, float] = {}
    for name, (tile, bf16_products) in KERNELS.items():
        if ALGORITHMS_BY_NAME[name].unsupported_reason(problem) is not None:
            continue
        mac, read = (_BF16_MAC_COST[problem.machine.isa], _READ_COST / 2) if bf16_products else (1, _READ_COST)
        if tile:
            macs = batch * _extension.cpp.winograd_gemm_rows(height, width, tile, problem.stride[0])
            transforms = macs * _TRANSFORM_COST * (1 / channels + 1 / out_channels)
            packing = 0 if problem.prepacked else _extension.cpp.WINOGRAD_POINTS * _PACK_WINOGRAD_COST
            costs[name] = macs * mac + transforms + (tile + 2) ** 2 * read + packing
        else:
            costs[name] = taps * (batch * height * width * mac + read)
            costs[name] += 0 if problem.prepacked else taps * _PACK_DIRECT_COST
    return costs


def _is_costlier(name: str) -> Callable[[Problem], bool]:
    """Return the predicate whether another algorithm with C++ kernels has a lower modelled cost than `name`."""

    def is_costlier(problem: Problem) -> bool:
        costs = _modelled_costs(problem)
        # Of equal costs the last algorithm of the list wins.
        return any(cost < costs[name] for cost in costs.values())

    return is_costlier


_EVIDENCE_COSTS = "estimated: multiply-adds, including the cost of reading and transforming the weight"
_REASON_COSTLIER = "another algorithm has a lower modelled cost for this number of pixels and channels"

# Training rules: the shapes for which these implementations were measured to be faster than ATen

#: Milliseconds of ATen and of fused_res:
#:
#: =========================== ================ ================ ================
#: convolution                 forward          input gradient   weight gradient
#: =========================== ================ ================ ================
#: 3x3, by Winograd            17-19 vs 7-13    16-17 vs 6-11    17-36 vs 8-11
#: 3x3, stride 2               9-19 vs 6-13     not measured     12-28 vs 9-17
#: 1x1                         8-22 vs 9-19     9-30 vs 8-17     10-25 vs 10-21
#: 7x7, output over 32 MB      33 vs 24         not measured     equal
#: =========================== ================ ================ ================
_EVIDENCE_ZEN4 = "measured on 2 Zen 4 cores (AVX-512), shapes of ResNet-18 and ResNet-50 at batch 16"
_EVIDENCE_DGRAD = (
    f"{_EVIDENCE_ZEN4}; 3x3 with stride 2: 2 cores of a Xeon, ms of ATen / direct: 128 channels at 56x56 14.6 / 10.3,"
    " 256 at 28x28 10.4 / 9.2, 512 at 14x14 12.2 / 11.1; 64 to 128 at 56x56 5.0 / 5.6, 256 to 512 at 14x14 5.6 / 5.6,"
    " where ATen's results come from malloc and are page faults in a step"
)
#: Fewer channels leave part of every vector register unused.
_MIN_CHANNELS = 16
#: Output pixels from which Winograd amortises the filter transform of every training step and the larger weight.
_MIN_OUTPUT_PIXELS = 128
#: Elements of a float32 tensor of 32 MB, not a cache's size: glibc's malloc serves larger allocations by mmap every
#: time, and the page faults take as long as a 1x1 convolution; this library's outputs come from its cache of freed
#: outputs.
_MALLOC_MMAP_FLOATS = 1 << 23


def _output_pixels(problem: Problem) -> int:
    return problem.input[0] * math.prod(problem.output_size)


def _channels(problem: Problem) -> int:
    return min(problem.weight[:2])


def _prefer_aten_forward(problem: Problem) -> bool:
    if _is_pointwise_with_full_vectors(problem):  # preferred, because it also computes the output's partial statistics
        return False
    return _output_pixels(problem) * problem.weight[0] <= _MALLOC_MMAP_FLOATS


def _prefer_aten_dgrad(problem: Problem) -> bool:
    if _is_pointwise_with_full_vectors(problem):
        return False
    if problem.stride != (1, 1):
        return _channels(problem) < _MIN_CHANNELS
    return math.prod(problem.input) <= _MALLOC_MMAP_FLOATS


def _is_pointwise_with_full_vectors(problem: Problem) -> bool:
    return problem.pointwise and _channels(problem) >= _MIN_CHANNELS


def _aten_wgrad_is_faster(problem: Problem) -> bool:
    return max(problem.weight[2:]) > 3 or problem.weight[1] < _MIN_CHANNELS


#: Weight elements, 256 KB, up to which a 1x1 convolution of few pixels packs its weight faster than oneDNN reorders it:
#: a comparison of two call overheads, for weights that the L2 of any supported processor holds.
_MAX_POINTWISE_WEIGHT = 1 << 16


def _has_few_pixels(problem: Problem) -> bool:
    if problem.operation == "forward" and problem.pointwise and math.prod(problem.weight) <= _MAX_POINTWISE_WEIGHT:
        return False
    return _output_pixels(problem) < _MIN_OUTPUT_PIXELS


_FEW_PIXELS = Rule(_has_few_pixels, "few output pixels", _EVIDENCE_ZEN4, TRAINING_OPERATIONS)
_FEW_CHANNELS = Rule(
    lambda problem: _channels(problem) < _MIN_CHANNELS, "few channels", _EVIDENCE_ZEN4, TRAINING_OPERATIONS
)
_SMALL_IMAGE = Rule(
    convolution.is_small_image,
    "one small image, whose convolution is one GEMM in ATen, without oneDNN",
    "2 Zen 4 cores, float32, us of ATen / direct or Winograd: 1x1, 16->96 channels, 32x32: 30 / 50; 192->64, 8x8: 21 /"
    " 31; 64->256, 14x14: 50 / 53; 3x3, 64->64, 8x8: 53 / 58; 14x14: 95 / 110",
    ("forward",),
)
_REASON_FITS_ALLOCATOR = "direct is no faster where the result is small enough for malloc to reuse freed memory"


def _native_algorithm(
    name: str,
    unsupported_reason: Callable[[Problem], str | None],
    rules: tuple[Rule, ...],
    training: bool,
    selection_reason: Callable[[Problem], str],
) -> Algorithm:
    kernel = KERNELS[name]
    implementations: dict[Operation, Callable[..., Any] | str] = {"inference": partial(_inference, kernel)}
    if training:
        gradient = partial(_backward, kernel)
        implementations |= {
            "forward": partial(_forward, kernel), "input_gradient": gradient, "weight_gradient": gradient
        }  # fmt: skip
    packed_format = "winograd" if kernel.tile else "direct"
    costlier = Rule(_is_costlier(name), _REASON_COSTLIER, _EVIDENCE_COSTS, ("inference",))
    return Algorithm(
        name,
        unsupported_reason,
        implementations,
        (costlier, *rules),
        selection_reason,
        returns_partials=True,
        compact_input_gradient=True,
        packs_master_weight=kernel.bf16_products,
        weight_packing="always",
        pack=lambda problem, weight: pack(weight, kernel, problem.stride, resident=problem.prepacked),
        # Tiles need another layout of a stem's weight than vdpbf16ps (isa/operand.h).
        pack_key=lambda problem: (packed_format, kernel.bf16_products and problem.machine.isa),
    )


def _describe_saving(problem: Problem) -> str:
    costs = _modelled_costs(problem)
    return f"1/{costs['direct'] / costs['winograd_f4x4']:.1f} of the multiply-adds (modelled)"


WINOGRAD_F4X4 = _native_algorithm(
    "winograd_f4x4",
    _winograd_unsupported_reason,
    (
        _FEW_PIXELS,
        _SMALL_IMAGE,
        _FEW_CHANNELS,
    ),
    True,
    _describe_saving,
)
WINOGRAD_F2X2 = _native_algorithm(
    "winograd_f2x2",
    _winograd_unsupported_reason,
    (),
    False,
    lambda problem: "small feature map: reads less of the weight than F(4x4)",
)
DIRECT_BF16 = _native_algorithm("direct_bf16", _bf16_unsupported_reason, (), True, _describe_direct)
#: Weight elements up to which the gradients compute the backward of the following norm: 160 KB of float32
#: accumulators, which stay in L2 beside the operands of a chunk. All convolutions of ResNets' first stages.
_MAX_FUSED_GRADIENT_WEIGHT = 40960

#: ``direct_bf16`` with the norms around the convolution: chunk by chunk, in pixels that stay in L2.
FUSED_BF16 = Algorithm(
    "fused_bf16",
    unsupported_reason=_fused_bf16_unsupported_reason,
    implementations={"forward": "conv_bn_stats", "input_gradient": "conv_backward", "weight_gradient": "conv_backward"},
    rules=(
        Rule(
            lambda problem: math.prod(problem.weight) > _MAX_FUSED_GRADIENT_WEIGHT,
            "a large weight: a separate pass of the following norm is faster",
            "2 cores of a Xeon with AMX, batch 16, ms of a block's step with fused gradients / without: bottleneck of"
            " stages 1 to 4 28.0 / 28.9, 16.7 / 16.4, 14.5 / 13.3, 18.7 / 15.9 (python -m benchmarks chain)",
            ("input_gradient", "weight_gradient"),
        ),
    ),
    selection_reason=lambda problem: "with the adjacent norms, in chunks of pixels that stay in L2",
    fused=True,
    returns_partials=True,
    compact_input_gradient=True,
    packs_master_weight=True,
)
#: Its gradients without the backward of the following norm, whose result both read.
FUSED_INPUT_BF16 = replace(
    FUSED_BF16,
    name="fused_input_bf16",
    implementations={"input_gradient": "conv_backward", "weight_gradient": "conv_backward"},
    rules=(),
    selection_reason=lambda problem: "with the preceding norm, in chunks of pixels that stay in L2",
    separate_norm_backward=True,
)
_EVIDENCE_FUSED_FP32 = (
    "2 cores of a Xeon, batch 16, ms of a bottleneck's step with norms as passes / in prologues of forward / and of"
    " gradients / fused gradients: stages 1 to 3 75.5 / 75.9 / 74.1 / 68.4, 59.6 / 60.2 / 58.9 / 58.9, 55.8 / 56.1 /"
    " 56.3 / 56.2; stage 4, without gradients, 59.4 / 59.9 (python -m benchmarks chain --dtype float32)"
)
_FUSED_FP32_RULES = (_FEW_PIXELS, _FEW_CHANNELS, _SMALL_IMAGE)
#: Weight elements up to which the gradients compute the backward of the following norm, in float32.
_MAX_FUSED_FP32_GRADIENT_WEIGHT = 65536
#: ``direct`` with the norms around a 1x1 convolution of float32.
FUSED_FP32 = replace(
    FUSED_BF16,
    name="fused_fp32",
    unsupported_reason=_fused_fp32_unsupported_reason,
    rules=(
        *_FUSED_FP32_RULES,
        Rule(
            lambda problem: not _has_split_k_gradient(problem),
            "a large weight, whose gradient reads the normalized input",
            _EVIDENCE_FUSED_FP32,
            ("forward",),
        ),
        Rule(
            lambda problem: math.prod(problem.weight) > _MAX_FUSED_FP32_GRADIENT_WEIGHT,
            "a large weight: a separate pass of the following norm is faster",
            _EVIDENCE_FUSED_FP32,
            ("input_gradient", "weight_gradient"),
        ),
    ),
    packs_master_weight=False,
)
#: Its gradients without the backward of the following norm.
FUSED_INPUT_FP32 = replace(
    FUSED_FP32,
    name="fused_input_fp32",
    implementations={"input_gradient": "conv_backward", "weight_gradient": "conv_backward"},
    rules=_FUSED_FP32_RULES,
    selection_reason=FUSED_INPUT_BF16.selection_reason,
    separate_norm_backward=True,
)
DIRECT = _native_algorithm(
    "direct",
    _direct_unsupported_reason,
    (
        _FEW_PIXELS,
        _SMALL_IMAGE,
        Rule(_prefer_aten_forward, _REASON_FITS_ALLOCATOR, _EVIDENCE_ZEN4, ("forward",)),
        Rule(_prefer_aten_dgrad, _REASON_FITS_ALLOCATOR, _EVIDENCE_DGRAD, ("input_gradient",)),
        Rule(
            _aten_wgrad_is_faster,
            "ATen's weight gradient of a filter larger than 3x3, or of few channels, is as fast",
            "2 cores of a Xeon with AMX, float32, batch 16: ResNet-50's stem 15.3 ms, ATen 16.1 ms",
            ("weight_gradient",),
        ),
    ),
    True,
    _describe_direct,
)
ONEDNN = Algorithm(
    "onednn",
    unsupported_reason=onednn.unsupported_reason,
    implementations={"inference": onednn.conv_bias_act},
    rules=(
        Rule(
            lambda problem: not problem.prepacked and problem.input[0] == 1,
            "batch of 1 with a weight that is not cached in packed form",
            "not measured",
        ),
    ),
    pack=onednn.pack,
    pack_key=lambda problem: ("onednn", problem.input, problem.dtype, torch.get_num_threads()),
    weight_packing="cached",
)


def _epilogue_unsupported_reason(problem: Problem) -> str | None:
    if not problem.prepacked or problem.dtype not in (torch.bfloat16, torch.float16):
        return "ATen adds a bias of the input's dtype; a float32 bias is that of a frozen model in bfloat16 or float16"
    return implicit_gemm.ATEN_EPILOGUE.unsupported_reason(problem)


#: ATen would round the float32 bias of a frozen model.
ATEN_EPILOGUE = replace(
    implicit_gemm.ATEN_EPILOGUE,
    unsupported_reason=_epilogue_unsupported_reason,
    rules=(),
    selection_reason=lambda problem: "float32 bias, addition and ReLU in one pass after ATen's convolution",
)
ALGORITHMS = (
    FUSED_BF16, FUSED_INPUT_BF16, FUSED_FP32, FUSED_INPUT_FP32,
    WINOGRAD_F4X4, WINOGRAD_F2X2, DIRECT_BF16, DIRECT, ONEDNN, ATEN_EPILOGUE,
    *convolution.ALGORITHMS,
)  # fmt: skip
ALGORITHMS_BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
