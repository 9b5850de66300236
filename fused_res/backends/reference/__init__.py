"""The reference backend: every operator in plain PyTorch, for any device and dtype.

It is the specification that the kernels are tested against, and the fallback that is always available.
"""

from __future__ import annotations

from fused_res import ops
from fused_res.dispatch import Machine
from fused_res.dispatch.backend import Kernels, import_operators

OP_FAMILIES = tuple(ops.OP_FAMILIES)
machine = Machine


def devices() -> None:
    return None


def unavailable() -> None:
    return None


def load() -> Kernels:
    from fused_res.backends.reference import convolution

    return Kernels(algorithms=convolution.ALGORITHMS, float32_bias=True, **import_operators(__name__, OP_FAMILIES))
