// Operators for batch norm statistics: compute those of a batch, and update the running ones. The kernels are
// in isa/batch_norm_forward.h, the two-pass scheme in partition.h.
#include "cpu/batch_norm_stats.h"

#include <torch/library.h>

namespace fused_res::cpu {
namespace {

Tensor batch_norm_stats(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double eps) {
  const ActivationTensor x(input);
  const NormParams norm(x, weight, bias, running_mean, running_var, training, eps);
  Tensor stats = empty_stats(x);
  if (training && x.shape.numel() > 0) {
    with_batch_stats(x, norm, stats.data_ptr(), [](const Block&) {});
  } else {
    finalize_running_stats(x, norm, stats.data_ptr());
  }
  return stats;
}

template <class T, class S>
void update_running(Tensor running, const S* batch, double momentum) {
  const Tensor dense = running.contiguous();
  T* out = dense.mutable_data_ptr<T>();
  for (int64_t c = 0; c < dense.numel(); ++c) {
    const double updated = (1.0 - momentum) * static_cast<double>(out[c]) + momentum * batch[c];
    out[c] = static_cast<T>(updated);
  }
  if (!dense.is_same(running)) running.copy_(dense);
}

template <class S>
void update_running(const Tensor& running, const Tensor& stats, StatsRow row, double momentum) {
  const S* batch = stats.const_data_ptr<S>() + row * stats.size(1);
  switch (running.scalar_type()) {
    case at::kFloat:
      return update_running<float>(running, batch, momentum);
    case at::kDouble:
      return update_running<double>(running, batch, momentum);
    case at::kBFloat16:
      return update_running<at::BFloat16>(running, batch, momentum);
    case at::kHalf:
      return update_running<at::Half>(running, batch, momentum);
    default:
      TORCH_CHECK_TYPE(false, "running_mean, running_var: expected floating point, got ",
                       running.scalar_type());
  }
}

void update_running_stats(at::TensorList running_mean, at::TensorList running_var, at::TensorList stats,
                          at::ArrayRef<double> momentum) {
  const size_t n = stats.size();
  TORCH_CHECK_VALUE(running_mean.size() == n && running_var.size() == n && momentum.size() == n,
                    "running_mean, running_var, momentum: expected as many entries as stats, ", n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor batch = stats[i].contiguous();
    const bool is_double = batch.scalar_type() == at::kDouble;
    TORCH_CHECK_VALUE(
        batch.dim() == 2 && batch.size(0) == kStatsRows && (is_double || batch.scalar_type() == at::kFloat),
        "stats: expected (5, C) of float32 or float64, got ", batch.sizes(), " of ", batch.scalar_type());
    for (const Tensor& running : {running_mean[i], running_var[i]}) {
      TORCH_CHECK_VALUE(running.is_cpu() && running.numel() == batch.size(1),
                        "running_mean, running_var: expected ", batch.size(1), " elements on the CPU, got ",
                        running.sizes());
    }
    const auto update = is_double ? &update_running<double> : &update_running<float>;
    update(running_mean[i], batch, kMean, momentum[i]);
    update(running_var[i], batch, kVar, momentum[i]);
    // The dispatcher does not bump the version for operators of extensions. Autograd needs it to detect that
    // a tensor it had saved was modified.
    for (const Tensor& running : {running_mean[i], running_var[i]})
      running.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_stats", TORCH_FN(batch_norm_stats));
  m.impl("update_running_stats", TORCH_FN(update_running_stats));
}
