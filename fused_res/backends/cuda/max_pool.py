"""The kernels of ``csrc/cuda/max_pool.cpp``."""

from fused_res.backends.cuda import operators

max_pool_forward = operators.max_pool_forward.default
max_pool_backward = operators.max_pool_backward.default
