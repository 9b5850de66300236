"""The kernels of ``csrc/cpu/batch_norm_*.cpp``. Overloads, not packets: resolving one costs a microsecond a call."""

import torch

_namespace = torch.ops.fused_res_cpu

batch_norm_stats = _namespace.batch_norm_stats.default
batch_norm_act_forward = _namespace.batch_norm_act_forward.default
batch_norm_act_apply = _namespace.batch_norm_act_apply.default
batch_norm_act_inference_ = _namespace.batch_norm_act_inference_.default
batch_norm_act_backward = _namespace.batch_norm_act_backward.default
batch_norm_act_backward_pair = _namespace.batch_norm_act_backward_pair.default
add_masked_ = _namespace.add_masked_.default
update_running_stats = _namespace.update_running_stats.default
