"""The kernels of ``csrc/cuda/batch_norm_sync.cpp``."""

from fused_res.backends.cuda import operators

batch_norm_partials = operators.batch_norm_partials.default
merge_stats = operators.merge_stats.default
batch_norm_sums = operators.batch_norm_sums.default
batch_norm_act_dx = operators.batch_norm_act_dx.default
