"""Bindings of the operators that ``csrc/cpu`` registers."""

from fused_res import ops

ops.define("fused_res_cpu", without_fakes=ops.CPU_SCHEMAS)
#: The batch norm and max pooling operators. Convolutions are selected as algorithms, see convolution.py.
OPERATORS = ops.operator_overloads("fused_res_cpu", ("batch_norm_act", "batch_norm_sync", "max_pool"))
pack_conv_weight, convolve, conv_backward, conv_program = ops.overloads("fused_res_cpu", ops.CPU_SCHEMAS)
