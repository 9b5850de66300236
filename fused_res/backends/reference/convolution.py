"""Convolution algorithms of the reference backend: the fused operators in plain PyTorch if preferred, else ATen's."""

from dataclasses import replace

from fused_res.backends.implicit_gemm import IMPLICIT_GEMM, fused_training_unsupported_reason
from fused_res.dispatch import TRAINING_OPERATIONS, Rule, convolution

REFERENCE_ALGORITHM = replace(
    IMPLICIT_GEMM,
    name="reference",
    unsupported_reason=lambda problem: (
        None if problem.operation == "inference" else fused_training_unsupported_reason(problem)
    ),
    rules=(
        Rule(
            lambda problem: True,
            "plain PyTorch has nothing to gain from fusion",
            "estimated: fused operators in plain PyTorch make the same passes over memory",
            TRAINING_OPERATIONS,
        ),
    ),
    selection_reason=lambda problem: "plain PyTorch",
)
ALGORITHMS = (REFERENCE_ALGORITHM, *convolution.ALGORITHMS)
