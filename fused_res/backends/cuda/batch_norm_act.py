"""The kernels of ``csrc/cuda/batch_norm_act.cpp``."""

from fused_res.backends.cuda import operators

batch_norm_stats = operators.batch_norm_stats.default
batch_norm_act_forward = operators.batch_norm_act_forward.default
batch_norm_act_apply = operators.batch_norm_act_apply.default
batch_norm_act_inference_ = operators.batch_norm_act_inference_.default
batch_norm_act_backward = operators.batch_norm_act_backward.default
batch_norm_act_backward_pair = operators.batch_norm_act_backward_pair.default
add_masked_ = operators.add_masked_.default
update_running_stats = operators.update_running_stats.default
