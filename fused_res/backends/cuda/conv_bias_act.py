"""The kernels of ``csrc/cuda/conv_bias_act.cpp``."""

from fused_res.backends.cuda import operators

conv_bias_act = operators.conv_bias_act.default
