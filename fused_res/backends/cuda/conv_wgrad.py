"""The kernels of ``csrc/cuda/conv_wgrad.cpp``."""

from fused_res.backends.cuda import operators

conv_wgrad = operators.conv_wgrad.default
