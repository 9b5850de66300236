"""CUDA C++ kernels (``csrc/cuda``), registered with the dispatcher as ``fused_res_cuda::*``.

Simulated on CPU tensors (``FUSED_RES_SIMULATOR``, for tests) they are ``fused_res_sim::*``.
"""

import torch

from fused_res import _extension, env, ops
from fused_res.backends import registry

_namespace = "fused_res_sim" if registry.simulating() else "fused_res_cuda"
ops.define(_namespace)
torch.ops.load_library(env.SIMULATOR.read() or str(_extension.cuda_library()[0]))
operators = getattr(torch.ops, _namespace)
