// Batch norm statistics on the host: the parameters of a norm, and the stats tensor (mean, invstd, scale,
// shift, var) from an input or from running statistics.
#pragma once

#include "cpu/batch_norm.h"

namespace fused_res::cpu {

// A per-channel parameter, (C,), converted to the dtype of the statistics; undefined if it is absent.
inline Tensor channel_vector(const OptionalTensor& tensor, int64_t channels, at::ScalarType dtype,
                             const char* name) {
  if (!tensor || !tensor->defined()) return {};
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, ": expected a CPU tensor, got ", tensor->device());
  TORCH_CHECK_VALUE(tensor->numel() == channels, name, ": expected ", channels,
                    " elements, one a channel, got ", tensor->sizes());
  return tensor->to(dtype).contiguous();
}

// The parameters of one norm: weight, bias, eps and, when not training, the running statistics.
struct NormParams {
  Tensor weight, bias, running_mean, running_var;
  bool training;
  double eps;

  NormParams(const ActivationTensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps)
      : training(training), eps(eps) {
    const auto vector = [&](const OptionalTensor& tensor, const char* name) {
      return channel_vector(tensor, x.shape.channels, stats_type(x.tensor), name);
    };
    this->weight = vector(weight, "weight"), this->bias = vector(bias, "bias");
    if (training) return;
    this->running_mean = vector(running_mean, "running_mean");
    this->running_var = vector(running_var, "running_var");
    TORCH_CHECK_VALUE(this->running_mean.defined() && this->running_var.defined(),
                      "running_mean, running_var: expected tensors when not training");
  }
  AffineArgs args() const { return {data_or_null(weight), data_or_null(bias), eps}; }
};

// Computes the stats from the running statistics, or, for an empty training batch, from zero mean and
// variance.
inline void finalize_running_stats(const ActivationTensor& x, const NormParams& norm, void* stats) {
  const int64_t channels = x.shape.channels;
  const auto moments = make_uninitialized(2 * channels);
  const auto fill = [&](const Tensor& source, double* out) {
    for (int64_t c = 0; c < channels; ++c) {
      if (!source.defined()) {
        out[c] = 0.0;
      } else {
        out[c] = source.scalar_type() == at::kDouble ? source.const_data_ptr<double>()[c]
                                                     : static_cast<double>(source.const_data_ptr<float>()[c]);
      }
    }
  };
  fill(norm.running_mean, moments.get());
  fill(norm.running_var, moments.get() + channels);
  kernels().finalize_stats[stats_index(x.tensor)](stats, moments.get(), 1.0, norm.args(), channels, 0,
                                                  channels);
}

// Computes the moments of the batch, mean[C] and M2[C], and calls finalize(group, moments) for every group of
// channels, then second(block) for every block.
template <class Finalize, class Second>
void with_moments(const ActivationTensor& x, const Finalize& finalize, const Second& second) {
  const Parallel parallel(x.shape.numel());
  const Partition partition(x.shape, x.tensor.element_size(), parallel.threads());
  const auto partial = make_uninitialized(partition.chunks() * 2 * x.shape.channels);
  const void* data = x.tensor.const_data_ptr();
  const auto moments = norm_kernels(x).moments;
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) {
        moments(block, data, &partial[chunk * 2 * x.shape.channels]);
      },
      [&](ChannelRange group) {
        merge_chunks(kernels(), partition, partial.get(), group);
        finalize(group, partial.get());
      },
      second);
}

// Computes the stats of the batch, then calls second(block) for every block.
template <class Second>
void with_batch_stats(const ActivationTensor& x, const NormParams& norm, void* stats, const Second& second) {
  const auto count = static_cast<double>(x.shape.values_per_channel());
  with_moments(
      x,
      [&](ChannelRange group, const double* moments) {
        kernels().finalize_stats[stats_index(x.tensor)](stats, moments, count, norm.args(), x.shape.channels,
                                                        group.begin, group.end);
      },
      second);
}

inline Tensor empty_stats(const ActivationTensor& x) {
  return at::detail::empty_cpu({kStatsRows, x.shape.channels}, stats_type(x.tensor));
}

}  // namespace fused_res::cpu
