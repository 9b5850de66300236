"""The operators of ``csrc/cpu``."""

from fused_res import ops

ops.define("fused_res_cpu", internal=ops.CPU_SCHEMAS)
#: Those of the norm and the pooling; convolutions are algorithms.
OPERATORS = ops.bind("fused_res_cpu", ("batch_norm_act", "batch_norm_sync", "max_pool"))
pack_conv_weight, convolve, conv_weight_gradient, conv_program = ops.overloads("fused_res_cpu", ops.CPU_SCHEMAS)
