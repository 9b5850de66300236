"""The kernels of ``csrc/cuda/conv_dgrad.cpp``."""

from fused_res.backends.cuda import operators

conv_dgrad = operators.conv_dgrad.default
