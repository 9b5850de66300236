"""The convolution algorithms of the reference: the fused operators written out, where required, else ATen's."""

from dataclasses import replace

from fused_res.backends.implicit_gemm import IMPLICIT_GEMM, fused_training_supports
from fused_res.dispatch import TRAINING, Rule, convolution

PLAIN = replace(
    IMPLICIT_GEMM,
    name="reference",
    supports=lambda problem: None if problem.operation == "inference" else fused_training_supports(problem),
    rules=(
        Rule(
            lambda problem: True,
            "plain PyTorch has nothing to gain from fusion",
            "counted: the fused operators written out make the same passes over memory",
            TRAINING,
        ),
    ),
    describe=lambda problem: "plain PyTorch",
)
ALGORITHMS = (PLAIN, *convolution.ALGORITHMS)
