"""The kernels of ``csrc/cpu/max_pool.cpp``."""

import torch

max_pool_forward = torch.ops.fused_res_cpu.max_pool_forward.default
max_pool_backward = torch.ops.fused_res_cpu.max_pool_backward.default
