"""The backends for GPUs in tests: on a GPU where there is one, else Triton interpreted and CUDA C++ simulated on CPU
tensors, on guarded memory."""

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


def cases(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Backend and dtype, but for Triton's interpreter and bfloat16, in which that is wrong: see tools/ptx."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{dtype}")
        for backend in BACKENDS
        for dtype in dtypes
        if DEVICE.type == "cuda" or (backend, dtype) != ("triton", torch.bfloat16)
    ]


def guarded(backend: str) -> contextlib.AbstractContextManager[None]:
    """Where an access out of bounds ends the process; on a GPU, compute-sanitizer's task."""
    if DEVICE.type == "cuda":
        return contextlib.nullcontext()
    if backend == "triton":
        from tests.support.guard_pages import guarded_launches

        return guarded_launches()
    from tools.cuda_sim.simulator import run_time

    return run_time().guarded()
