"""The convolution algorithms of the GPU backends: our implicit GEMM, fused with the norms around it, then ATen's.

That cuDNN is faster outside of 1x1 kernels is what others have published; nothing was measured with these kernels.
"""

from __future__ import annotations

import torch

from fused_res.dispatch import Algorithm, Problem, Rule, convolution

_HALF = (torch.bfloat16, torch.float16)
#: Fewer channels leave most of a matrix instruction idle.
_LEAST_CHANNELS = 16
_PUBLISHED = "published figures of cuDNN; not measured with these kernels"
_COUNTED = "counted: a 16x8x16 instruction, 8 elements a load"
_TRANSPOSED = "not measured: the kernel would transpose its operands first"


def _supports(problem: Problem) -> str | None:
    if len(problem.weight) != 4:
        return "fused convolutions are for images"
    if problem.dtype == torch.float64:
        return "float64 has no fused convolution"
    return None if problem.operation == "inference" else fused_training_supports(problem)


def fused_training_supports(problem: Problem) -> str | None:
    """What the operators ``conv_bn_stats``, ``conv_dgrad`` and ``conv_wgrad`` are for, in any backend."""
    if len(problem.weight) != 4 or not problem.channels_last:
        return "fused convolutions read images in channels_last memory"
    if problem.groups > 1:
        return "grouped convolutions are not fused"
    if problem.weight[0] == 1:
        return "a single channel has no rows of channels"
    if problem.operation == "forward":
        return None
    if not problem.pointwise:
        return "the fused backward is for 1x1 convolutions"
    # The fused input gradient has no stride; a projection's is added where its pixels are.
    if problem.stride != (1, 1) and not problem.projection:
        return "the fused backward of a chain has stride 1"
    return None


def _no_fused_backward(problem: Problem) -> bool:
    if problem.operation == "inference":
        return not problem.pointwise or problem.groups > 1
    return not problem.pointwise or (problem.stride != (1, 1) and not problem.projection)


def _does_not_fill(problem: Problem) -> bool:
    return min(problem.weight[:2]) < _LEAST_CHANNELS or any(channels % 8 for channels in problem.weight[:2])


IMPLICIT_GEMM = Algorithm(
    "implicit_gemm",
    supports=_supports,
    serves={
        "inference": "conv_bias_act",
        "forward": "conv_bn_stats",
        "input_gradient": "conv_dgrad",
        "weight_gradient": "conv_wgrad",
    },
    rules=(
        Rule(lambda problem: not problem.channels_last, "fused convolutions read channels_last memory", _TRANSPOSED),
        Rule(_no_fused_backward, "cuDNN's kernels are ahead, and their backward reads the activation", _PUBLISHED),
        Rule(lambda problem: problem.dtype not in _HALF, "float32 gains less than cuDNN is ahead", _PUBLISHED),
        Rule(_does_not_fill, "its channels do not fill matrix instructions and 16-byte loads", _COUNTED),
    ),
    describe=lambda problem: "1x1: fused with the norm, the addition and the ReLU around it",
    fused=True,
    statistics=True,
    compact=True,
)
ALGORITHMS = (IMPLICIT_GEMM, *convolution.ALGORITHMS)
