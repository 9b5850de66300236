"""Plain PyTorch: defines the maths, runs on every device and dtype, and is the fallback that always works."""

from __future__ import annotations

from fused_res import ops
from fused_res.dispatch import Machine
from fused_res.dispatch.backend import Kernels, import_operators

STEMS = tuple(ops.STEMS)
machine = Machine
AUTO = {"cpu": 0, "cuda": 0}
WHEN_NAMED = "planned"


def devices() -> None:
    return None


def unavailable() -> None:
    return None


def load() -> Kernels:
    from fused_res.backends.reference import convolution

    return Kernels(algorithms=convolution.ALGORITHMS, **import_operators(__name__, STEMS))
