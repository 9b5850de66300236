"""CUDA C++ kernels (``csrc/cuda``), registered with the dispatcher as ``fused_res_cuda::*``.

Simulated on CPU tensors (``FUSED_RES_SIMULATOR``, for tests) they are ``fused_res_sim::*``.
"""

from __future__ import annotations

import os

import torch

from fused_res import _extension, env, ops
from fused_res.dispatch import Machine
from fused_res.dispatch.backend import Kernels

STEMS = tuple(ops.STEMS)
machine = Machine
AUTO = {"cuda": 2}
WHEN_NAMED = "fused"
#: Compute capability that the kernels are compiled for.
OLDEST_GPU = (8, 0)


def simulating() -> bool:
    """Whether the kernels are simulated on CPU tensors: ``tools/cuda_sim``."""
    return bool(env.SIMULATOR.read())


def namespace() -> str:
    """The dispatcher namespace of the operators."""
    return "fused_res_sim" if simulating() else "fused_res_cuda"


def devices() -> tuple[str, ...]:
    return ("cpu",) if simulating() else ("cuda",)


def unavailable() -> str | None:
    if simulating():
        library = env.SIMULATOR.read()
        return None if os.path.exists(library) else f"{env.SIMULATOR.name} names {library}, and there is no such file"
    _, reason = _extension.cuda_library()
    return reason or _gpu_missing()


def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here that this torch can use"
    found = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if found < OLDEST_GPU:
        needed, has = (".".join(map(str, version)) for version in (OLDEST_GPU, found))
        return f"its kernels need a GPU of compute capability {needed} or newer, and this one has {has}"
    return None


def load() -> Kernels:
    from fused_res.backends import implicit_gemm

    ops.define(namespace())
    torch.ops.load_library(env.SIMULATOR.read() or str(_extension.cuda_library()[0]))
    return Kernels(algorithms=implicit_gemm.ALGORITHMS, **ops.bind(namespace(), STEMS))
