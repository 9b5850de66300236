"""Convolution algorithms of the GPU backends: implicit GEMM with fused batch norm prologue and epilogue, then ATen's.

Assumed from published figures, not measured: cuDNN is faster than these kernels except for 1x1 filters.
"""

from __future__ import annotations

import torch

from fused_res.dispatch import TRAINING_OPERATIONS, Algorithm, Problem, Rule, convolution

_HALF = (torch.bfloat16, torch.float16)
#: With fewer channels a large part of each MMA tile is padding.
_MIN_CHANNELS = 16
_EVIDENCE_CUDNN = "published figures of cuDNN; not measured with these kernels"
_EVIDENCE_MMA_TILE = "estimated: an MMA instruction is 16x8x16, a load is 8 elements"
_EVIDENCE_LAYOUT = "not measured: the operands would have to be converted to channels_last first"


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
    # conv_dgrad ignores the stride: it computes the gradient at the sampled input positions only, (N, C, P, Q).
    # Scattering it into the full gradient, (N, C, H, W), is implemented for projections only.
    if problem.stride != (1, 1) and not problem.projection:
        return "the fused backward supports stride 1 only, except for projections"
    return None


def _cudnn_inference_is_faster(problem: Problem) -> bool:
    return not problem.pointwise or problem.groups > 1


def _cudnn_training_is_faster(problem: Problem) -> bool:
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
        Rule(_cudnn_inference_is_faster, "cuDNN is faster for this shape", _EVIDENCE_CUDNN, ("inference",)),
        Rule(
            _cudnn_training_is_faster,
            "cuDNN is faster for this shape, and its weight gradient reads the normalized activation from memory",
            _EVIDENCE_CUDNN,
            TRAINING_OPERATIONS,
        ),
        Rule(
            lambda problem: problem.dtype not in _HALF,
            "in float32, cuDNN is faster by more than the fusion saves",
            _EVIDENCE_CUDNN,
        ),
        Rule(_underfills_mma, "the channels do not fill MMA tiles and 16-byte loads", _EVIDENCE_MMA_TILE),
    ),
    # No sizes in the text: torch.compile traces it with symbolic ones.
    selection_reason=lambda problem: "1x1: " * problem.pointwise + "fused with the adjacent norm, addition and ReLU",
    fused=True,
    returns_partials=True,
    compact_input_gradient=True,
)
ALGORITHMS = (IMPLICIT_GEMM, *convolution.ALGORITHMS)
