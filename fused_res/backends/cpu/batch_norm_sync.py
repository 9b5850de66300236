"""The kernels of ``csrc/cpu/batch_norm_sync.cpp``."""

import torch

_namespace = torch.ops.fused_res_cpu

batch_norm_partials = _namespace.batch_norm_partials.default
merge_stats = _namespace.merge_stats.default
batch_norm_sums = _namespace.batch_norm_sums.default
batch_norm_act_dx = _namespace.batch_norm_act_dx.default
