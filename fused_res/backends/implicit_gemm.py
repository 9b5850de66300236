"""Convolution algorithms of the GPU backends: implicit GEMM with fused batch norm prologue and epilogue, then ATen's.

**Where the fused 1x1 convolution wins.** A 1x1 convolution of ``M`` pixels from ``C`` to ``K`` channels multiplies
``M * C * K`` pairs and moves ``M * (C + K)`` 16-bit values, so its arithmetic intensity is ``C * K / (C + K)`` FLOP per
byte. Fusion saves passes of the norms over the same ``M`` pixels, which are bytes. It costs arithmetic: the fused
kernels multiply at a fraction of cuDNN's rate, and repeat the operand prologue for every column of tiles. At a low
intensity both convolutions are bound by memory and the saved bytes are the gain; at a high one the fused kernel is
bound by arithmetic and the saved bytes no longer pay for it. The break-even is thus a share of the ridge point of the
machine, its FLOP per byte with the instruction that the kernels use. The shares follow from the estimated times, in
us, of one convolution of ResNet-50 at batch 256 in bfloat16 on an H200 (``cuda``, ``triton``: fused; ``cuDNN``:
cuDNN's convolution and this library's norm passes):

====================  =========  ============  ==============  ==============  ==================
1x1                   intensity  training      training        training        inference with add
                                 ``cuda``      ``triton``      ``cuDNN``       ``cuda`` / cuDNN
====================  =========  ============  ==============  ==============  ==================
64 -> 256, 56x56      51         261           160             282 to 297      1.86x
128 -> 512, 28x28     102        180           130             140 to 154      1.67x
256 -> 1024, 14x14    205        142           120             88              1.36x
512 -> 2048, 7x7      410        124           120             63 to 67        1.06x
====================  =========  ============  ==============  ==============  ==================

Interpolated, training breaks even at an intensity of 70 (``cuda``) and 117 (``triton``), a little more than half of the
ridge point of their instruction: half of it is the limit. Inference without an addition saves half of the bytes. The
model of ``python -m benchmarks launches``, which predicts whole steps, puts the limits higher still. None of this has
been measured.

**The shortcut's gradient in an epilogue.** Where a block's first 1x1 convolution is too intense for that, its input
gradient can still add the gradient of an identity shortcut in its epilogue (``implicit_gemm_add``), without a prologue.
This saves one write and one read of the block's input gradient. Per pixel, the kernel reads ``K`` values and the ``C``
of the addend, writes ``C``, and multiplies ``C * K`` pairs: the bytes and FLOPs of inference with an addition from
``K`` to ``C`` channels, so the same limit applies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import torch

from fused_res.dispatch import TRAINING_OPERATIONS, Algorithm, Machine, Problem, Rule, convolution

_HALF = (torch.bfloat16, torch.float16)
#: With fewer channels a large part of each MMA tile is padding.
_MIN_CHANNELS = 16

#: Ridge point of the instruction that a backend's kernels multiply with: dense 16-bit FLOP per byte of DRAM traffic, by
#: datasheet. On Hopper, `mma.sync` (cuda) reaches about two thirds of the rate of `wgmma` (triton).
_RIDGE_POINTS = {
    ("cuda", "sm_80"): 200.0,
    ("cuda", "sm_90"): 137.0,
    ("triton", "sm_80"): 200.0,
    ("triton", "sm_90"): 206.0,
    ("triton", "sm_100"): 281.0,
}
#: Of any other GPU: lower than that of any GPU with these instructions, so that cuDNN runs in case of doubt.
_DEFAULT_RIDGE_POINT = 100.0

#: Highest arithmetic intensity of a fused 1x1 convolution, as shares of the ridge point.
_TRAINING_SHARE, _INFERENCE_SHARE, _INFERENCE_WITH_RESIDUAL_SHARE = 0.5, 0.93, 1.86

_EVIDENCE_CUDNN = "published figures of cuDNN; not measured with these kernels"
_EVIDENCE_INTENSITY = "estimated from bytes and FLOPs for an H200, see fused_res/backends/implicit_gemm.py"
_EVIDENCE_MMA_TILE = "estimated: an MMA instruction is 16x8x16, a load is 8 elements"
_EVIDENCE_LAYOUT = "not measured: the operands would have to be converted to channels_last first"


_assumed_machine: Machine | None = None


def machine() -> Machine:
    """Return the architecture of the first NVIDIA GPU, such as ``"sm_90"``; "" without a GPU."""
    return _detect_machine() if _assumed_machine is None else _assumed_machine


@contextlib.contextmanager
def assume_machine(isa: str) -> Iterator[None]:
    """Select and launch as on a GPU of this architecture: for compilation ahead of time, and for predictions."""
    global _assumed_machine
    previous, _assumed_machine = _assumed_machine, Machine(isa)
    try:
        yield
    finally:
        _assumed_machine = previous


@cache
def _detect_machine() -> Machine:
    if not torch.cuda.is_available():
        return Machine()
    major, minor = torch.cuda.get_device_capability(0)
    return Machine(f"sm_{major}{minor}")


def _unsupported_reason(problem: Problem) -> str | None:
    if len(problem.weight) != 4:
        return "fused convolutions are 2D only"
    if problem.dtype == torch.float64:
        return "fused convolutions do not support float64"
    return None if problem.operation == "inference" else fused_training_unsupported_reason(problem)


def _add_unsupported_reason(problem: Problem) -> str | None:
    if not problem.residual:
        return "no gradient of an identity shortcut is added"
    return _unsupported_reason(problem)


def fused_training_unsupported_reason(problem: Problem) -> str | None:
    """Return why ``conv_bn_stats``, ``conv_dgrad`` or ``conv_wgrad`` do not support a problem, or None if they do."""
    if len(problem.weight) != 4 or not problem.channels_last:
        return "fused convolutions require channels_last images"
    if problem.groups > 1:
        return "grouped convolutions are not fused"
    if problem.weight[0] == 1:
        return "an output with a single channel is not channels_last"
    if problem.operation == "forward":
        return None
    if not problem.pointwise:
        return "the fused backward supports 1x1 convolutions only"
    # conv_dgrad ignores the stride: it computes the gradient at the sampled input positions only, (N, C, P, Q).
    # Scattering it into the full gradient, (N, C, H, W), is implemented for projections only.
    if problem.stride != (1, 1) and not problem.projection:
        return "the fused backward supports stride 1 only, except for projections"
    return None


def _is_not_pointwise(problem: Problem) -> bool:
    return not problem.pointwise or problem.groups > 1


def _has_strided_gradient(problem: Problem) -> bool:
    return problem.stride != (1, 1) and not problem.projection


def _exceeds_intensity(problem: Problem, backend: str, prologue: bool) -> bool:
    outputs, channels = problem.weight[:2]
    ridge = _RIDGE_POINTS.get((backend, problem.machine.isa), _DEFAULT_RIDGE_POINT)
    share = _TRAINING_SHARE
    if problem.operation == "inference" or not prologue:
        share = _INFERENCE_WITH_RESIDUAL_SHARE if problem.residual else _INFERENCE_SHARE
    return outputs * channels / (outputs + channels) > share * ridge


def _underfills_mma(problem: Problem) -> bool:
    return min(problem.weight[:2]) < _MIN_CHANNELS or any(channels % 8 for channels in problem.weight[:2])


#: The algorithm without its rules, which depend on the speed of a backend's kernels.
IMPLICIT_GEMM = Algorithm(
    "implicit_gemm",
    unsupported_reason=_unsupported_reason,
    implementations={
        "inference": "conv_bias_act",
        "forward": "conv_bn_stats",
        "input_gradient": "conv_dgrad",
        "weight_gradient": "conv_wgrad",
    },
    # No sizes in the text: torch.compile traces it with symbolic ones.
    selection_reason=lambda problem: "1x1: " * problem.pointwise + "fused with the adjacent norm, addition and ReLU",
    fused=True,
    returns_partials=True,
    compact_input_gradient=True,
)

#: ``conv_dgrad`` without its prologue, for the sake of the addition in its epilogue; also without rules.
IMPLICIT_GEMM_ADD = Algorithm(
    "implicit_gemm_add",
    unsupported_reason=_add_unsupported_reason,
    implementations={"input_gradient": "conv_dgrad"},
    selection_reason=lambda problem: "1x1: fused with the addition of the shortcut's gradient",
    special_case=True,
)


#: cuDNN's convolution, then bias, addition and ReLU in one pass. ATen makes a pass for each of them in bfloat16.
ATEN_EPILOGUE = Algorithm(
    "aten_epilogue",
    unsupported_reason=lambda problem: (
        "a dispatch mode or a tensor subclass requires ATen's operators" if problem.under_torch_dispatch else None
    ),
    implementations={"inference": "aten_conv_with_epilogue"},
    rules=(
        Rule(
            lambda problem: problem.dtype != torch.bfloat16,
            "cuDNN has a fused epilogue for this dtype",
            _EVIDENCE_CUDNN,
        ),
    ),
    special_case=True,
    selection_reason=lambda problem: "bias, addition and ReLU in one pass after cuDNN's convolution",
)


@cache
def algorithms(backend: str) -> tuple[Algorithm, ...]:
    """Return the algorithms of a GPU backend, ``"triton"`` or ``"cuda"``."""
    rules = (
        Rule(lambda problem: not problem.channels_last, "fused convolutions require channels_last", _EVIDENCE_LAYOUT),
        Rule(_is_not_pointwise, "cuDNN is faster for this shape", _EVIDENCE_CUDNN),
        Rule(
            _has_strided_gradient,
            "cuDNN is faster for this shape, and its weight gradient reads the normalized activation from memory",
            _EVIDENCE_CUDNN,
            TRAINING_OPERATIONS,
        ),
        Rule(
            lambda problem: problem.dtype not in _HALF,
            "in float32, cuDNN is faster by more than the fusion saves",
            _EVIDENCE_CUDNN,
        ),
        Rule(
            lambda problem: problem.dtype == torch.float16,
            "in float16, cuDNN has the same fused epilogue",
            _EVIDENCE_CUDNN,
            ("inference",),
        ),
        Rule(_underfills_mma, "the channels do not fill MMA tiles and 16-byte loads", _EVIDENCE_MMA_TILE),
    )

    def with_intensity_limit(algorithm: Algorithm) -> Algorithm:
        exceeds = partial(_exceeds_intensity, backend=backend, prologue=algorithm.fused)
        reason = "cuDNN is faster at this many FLOP per byte by more than the fusion saves"
        return replace(algorithm, rules=(*rules, Rule(exceeds, reason, _EVIDENCE_INTENSITY)))

    fused = map(with_intensity_limit, (IMPLICIT_GEMM, IMPLICIT_GEMM_ADD))
    return *fused, ATEN_EPILOGUE, *convolution.ALGORITHMS
