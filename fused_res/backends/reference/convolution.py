"""Convolution algorithms of the reference backend: the fused operators in plain PyTorch if preferred, else ATen's."""

from dataclasses import replace

from fused_res.backends.implicit_gemm import IMPLICIT_GEMM, supports_fused_training
from fused_res.dispatch import TRAINING_OPERATIONS, Rule, convolution

REFERENCE_ALGORITHM = replace(
    IMPLICIT_GEMM,
    name="reference",
    supports=lambda problem: None if problem.operation == "inference" else supports_fused_training(problem),
    rules=(
        Rule(
            lambda problem: True,
            "plain PyTorch has nothing to gain from fusion",
            "estimated: fused operators in plain PyTorch make the same passes over memory",
            TRAINING_OPERATIONS,
        ),
    ),
    describe=lambda problem: "plain PyTorch",
)
ALGORITHMS = (REFERENCE_ALGORITHM, *convolution.ALGORITHMS)
