"""CUDA C++ backend: the kernels in ``csrc/cuda``, registered with the dispatcher as ``fused_res_cuda::*``.

For tests, a simulator runs the same sources on CPU tensors (``FUSED_RES_SIMULATOR``) as ``fused_res_sim::*``.
"""

from __future__ import annotations

import os

import torch

from fused_res import _extension, env, ops
from fused_res.backends import implicit_gemm
from fused_res.backends.pieces import with_all_activations
from fused_res.dispatch.backend import Kernels
from fused_res.ops.checks import RELU_OR_IDENTITY

OP_FAMILIES = tuple(ops.OP_FAMILIES)
machine = implicit_gemm.machine
#: Lowest compute capability that the kernels support: they use ``cp.async`` and bfloat16 ``mma.sync``.
MIN_COMPUTE_CAPABILITY = (8, 0)


def is_simulated() -> bool:
    """Return whether the simulator (``tools/cuda_sim``) runs the kernels, on CPU tensors."""
    return bool(env.SIMULATOR.read())


def namespace() -> str:
    """Return the dispatcher namespace of the operators."""
    return "fused_res_sim" if is_simulated() else "fused_res_cuda"


def devices() -> tuple[str, ...]:
    return ("cpu",) if is_simulated() else ("cuda",)


def unavailable() -> str | None:
    if is_simulated():
        library = env.SIMULATOR.read()
        return None if os.path.exists(library) else f"{env.SIMULATOR.name}: {library} does not exist"
    _, reason = _extension.cuda_library()
    return reason or _gpu_missing()


def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is available to this PyTorch"
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    newest = max(capabilities)
    if newest < MIN_COMPUTE_CAPABILITY:
        needed, has = (".".join(map(str, version)) for version in (MIN_COMPUTE_CAPABILITY, newest))
        return f"the kernels require a GPU of compute capability {needed} or newer, got {has}"
    if all(_extension.cuda_code_missing(capability) for capability in capabilities):
        return _extension.cuda_code_missing(newest)
    return None


def load() -> Kernels:
    ops.define(namespace())
    torch.ops.load_library(env.SIMULATOR.read() or str(_extension.cuda_library()[0]))
    operators = ops.operator_overloads(namespace(), OP_FAMILIES)
    kernels = Kernels(algorithms=implicit_gemm.algorithms("cuda"), activations=RELU_OR_IDENTITY, **operators)
    return with_all_activations(kernels)
