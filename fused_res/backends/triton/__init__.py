"""Triton backend for NVIDIA GPUs. Kernels are compiled at run time; ``TRITON_INTERPRET=1`` runs them on the CPU.

Device code is in ``kernels/``. The modules next to this file are host code: they select tile sizes and launch the
kernels. The operators' contracts are in :mod:`fused_res.ops.schemas`.

At small batch sizes a training step is bound by the CPU time of its launches. A CUDA graph of the whole step has none:
``torch.cuda.graph`` (forward, backward and optimizer), ``torch.cuda.make_graphed_callables`` (single blocks), and
``torch.compile(mode="reduce-overhead")``. Blocks need no changes for it. A replay updates running statistics and
``num_batches_tracked`` once, as a step does; warm-up steps and ``make_graphed_callables`` update them, too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

from fused_res import ops
from fused_res.backends import implicit_gemm
from fused_res.dispatch.backend import Kernels, import_operators

OP_FAMILIES = tuple(ops.OP_FAMILIES)
machine = implicit_gemm.machine
MIN_TRITON_VERSION = (3, 6)


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels: on CPU tensors, and on CUDA tensors through a copy."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if is_interpreted() else ("cuda",)


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON_VERSION:
        return f"Triton {version} is too old: pip install 'triton>={'.'.join(map(str, MIN_TRITON_VERSION))}'"
    return None


def unavailable() -> str | None:
    reason = _missing()
    if reason is None and not is_interpreted() and not torch.cuda.is_available():
        return "no NVIDIA GPU is available to this PyTorch (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return reason


def load() -> Kernels:
    return Kernels(algorithms=implicit_gemm.algorithms("triton"), **import_operators(__name__, OP_FAMILIES))
