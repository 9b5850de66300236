"""Triton kernels for NVIDIA GPUs: nothing to compile at installation. ``TRITON_INTERPRET=1`` runs them on the CPU.

Device code is in ``kernels/``, and what chooses tiles and launches beside this file, under the same stem.
"""

from collections.abc import Callable
from typing import Any

from fused_res import ops
from fused_res.backends.registry import interpreting

ops.define("fused_res_triton")


def operator(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an implementation for ``fused_res_triton::`` under its own name."""
    devices = ("CUDA", "CPU") if interpreting() else ("CUDA",)
    return ops.operator("fused_res_triton", implementation.__name__, implementation, *devices)
