"""GPU backends under test: on a GPU if there is one, else on CPU tensors with guard pages.

Without a GPU, Triton's interpreter runs the Triton kernels, and the simulator (``tools/cuda_sim``) those in CUDA C++.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fused_res

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in ("triton", "cuda") if fused_res.backends.unavailable(name) is None]
if not BACKENDS:
    pytest.skip(
        "; ".join(str(fused_res.backends.unavailable(name)) for name in ("triton", "cuda")), allow_module_level=True
    )


def backend_dtype_params(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Return pytest parameters for every backend and dtype.

    bfloat16 is omitted for Triton's interpreter, whose bfloat16 arithmetic is incorrect; ``tools/ptx`` covers it.
    """
    return [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}")
        for backend in BACKENDS
        for dtype in dtypes
        if DEVICE.type == "cuda" or (backend, dtype) != ("triton", torch.bfloat16)
    ]


def guarded_memory(backend: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which an out-of-bounds access ends the process.

    On a GPU the context does nothing: compute-sanitizer checks accesses there.
    """
    if DEVICE.type == "cuda":
        return contextlib.nullcontext()
    if backend == "triton":
        from tests.support.guard_pages import launches_with_guard_pages

        return launches_with_guard_pages()
    from tools.cuda_sim.simulator import load_simulator

    return load_simulator().guard_allocations()
