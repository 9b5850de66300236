"""Triton kernels for NVIDIA GPUs: nothing to compile at installation. ``TRITON_INTERPRET=1`` runs them on the CPU.

Device code is in ``kernels/``, and what chooses tiles and launches beside this file, under the same stem.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

from fused_res import ops
from fused_res.dispatch import Machine
from fused_res.dispatch.backend import Kernels, import_operators

STEMS = tuple(ops.STEMS)
machine = Machine
AUTO = {"cuda": 1}
WHEN_NAMED = "fused"
OLDEST_TRITON = (3, 6)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (on CUDA tensors too, by a copy)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if interpreting() else ("cuda",)


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
    return None


def unavailable() -> str | None:
    reason = _missing()
    if reason is None and not interpreting() and not torch.cuda.is_available():
        return "there is no NVIDIA GPU here that this torch can use (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return reason


def load() -> Kernels:
    from fused_res.backends import implicit_gemm

    return Kernels(algorithms=implicit_gemm.ALGORITHMS, **import_operators(__name__, STEMS))
