"""Convolution algorithms of the GPU backends: implicit GEMM with fused batch norm prologue and epilogue, then ATen's.

That cuDNN is faster except for 1x1 kernels is an assumption from published figures; it was not measured with these
kernels.
"""

from __future__ import annotations

import torch

from fused_res.dispatch import Algorithm, Problem, Rule, convolution

_HALF = (torch.bfloat16, torch.float16)
#: With fewer channels most of a matrix instruction (MMA) is idle.
_MIN_CHANNELS = 16
_EVIDENCE_CUDNN = "published figures of cuDNN; not measured with these kernels"
_EVIDENCE_MMA_TILE = "estimated: an MMA instruction is 16x8x16, a load is 8 elements"
_EVIDENCE_LAYOUT = "not measured: the kernel would transpose its operands first"


def _unsupported_reason(problem: Problem) -> str | None:
    if len(problem.weight) != 4:
        return "fused convolutions are 2D only"
    if problem.dtype == torch.float64:
        return "fused convolutions do not support float64"
    return None if problem.operation == "inference" else fused_training_unsupported_reason(problem)


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
    # The fused input gradient ignores the stride: it is compact. Only a projection's is scattered into the block's.
    if problem.stride != (1, 1) and not problem.projection:
        return "the fused backward supports stride 1 only, except for projections"
    return None


def _lacks_fused_backward(problem: Problem) -> bool:
    if problem.operation == "inference":
        return not problem.pointwise or problem.groups > 1
    return not problem.pointwise or (problem.stride != (1, 1) and not problem.projection)


def _underfills_mma(problem: Problem) -> bool:
    return min(problem.weight[:2]) < _MIN_CHANNELS or any(channels % 8 for channels in problem.weight[:2])


IMPLICIT_GEMM = Algorithm(
    "implicit_gemm",
    unsupported_reason=_unsupported_reason,
    implementations={
        "inference": "conv_bias_act",
        "forward": "conv_bn_stats",
        "input_gradient": "conv_dgrad",
        "weight_gradient": "conv_wgrad",
    },
    rules=(
        Rule(lambda problem: not problem.channels_last, "fused convolutions require channels_last", _EVIDENCE_LAYOUT),
        Rule(
            _lacks_fused_backward,
            "cuDNN's kernels are faster, and their backward reads the activation",
            _EVIDENCE_CUDNN,
        ),
        Rule(
            lambda problem: problem.dtype not in _HALF,
            "in float32, fusion gains less than cuDNN's lead",
            _EVIDENCE_CUDNN,
        ),
        Rule(_underfills_mma, "the channels do not fill MMA tiles and 16-byte loads", _EVIDENCE_MMA_TILE),
    ),
    selection_reason=lambda problem: "1x1: fused with the adjacent norm, addition and ReLU",
    fused=True,
    returns_partials=True,
    compact_input_gradient=True,
)
ALGORITHMS = (IMPLICIT_GEMM, *convolution.ALGORITHMS)
