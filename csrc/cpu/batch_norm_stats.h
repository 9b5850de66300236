// From an input to its normalisation, for the operators that return it and for those that go on to use it.
#pragma once

#include "cpu/batch_norm.h"

namespace fused_res::cpu {

// A parameter of C numbers in the dtype of the statistics; undefined where there is none.
inline Tensor channel_vector(const OptionalTensor& tensor, int64_t channels, at::ScalarType dtype,
                             const char* name) {
  if (!tensor || !tensor->defined()) return {};
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, ": expected a CPU tensor, got ", tensor->device());
  TORCH_CHECK_VALUE(tensor->numel() == channels, name, ": expected ", channels,
                    " elements, one a channel, got ", tensor->sizes());
  return tensor->to(dtype).contiguous();
}

// What a normalisation needs beside x.
struct Norm {
  Tensor weight, bias, running_mean, running_var;
  bool training;
  double eps;

  Norm(const Operand& x, const OptionalTensor& weight, const OptionalTensor& bias,
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
  ParamArgs args() const { return {data_or_null(weight), data_or_null(bias), eps}; }
};

// Statistics that do not depend on x: the running ones, or those of no values at all.
inline void finish_given(const Operand& x, const Norm& norm, void* stats) {
  const int64_t channels = x.shape.channels;
  const auto moments = uninitialised(2 * channels);
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
  kernels().finish[stats_index(x.tensor)](stats, moments.get(), 1.0, norm.args(), channels, 0, channels);
}

// The moments of the batch, mean[C] and M2[C]: finish(group, moments) for every group of channels, then
// second(block) for every block.
template <class Finish, class Second>
void with_moments(const Operand& x, const Finish& finish, const Second& second) {
  const Parallel parallel(x.shape.numel());
  const Partition partition(x.shape, x.tensor.element_size(), parallel.threads());
  const auto partial = uninitialised(partition.chunks() * 2 * x.shape.channels);
  const void* data = x.tensor.const_data_ptr();
  const auto moments = norm_kernels(x).moments;
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) {
        moments(block, data, &partial[chunk * 2 * x.shape.channels]);
      },
      [&](Channels group) {
        merge_chunks(kernels(), partition, partial.get(), group);
        finish(group, partial.get());
      },
      second);
}

// Statistics of the batch, then second(block) for every block.
template <class Second>
void with_batch_stats(const Operand& x, const Norm& norm, void* stats, const Second& second) {
  const auto count = static_cast<double>(x.shape.values_per_channel());
  with_moments(
      x,
      [&](Channels group, const double* moments) {
        kernels().finish[stats_index(x.tensor)](stats, moments, count, norm.args(), x.shape.channels,
                                                group.begin, group.end);
      },
      second);
}

inline Tensor empty_stats(const Operand& x) {
  return at::detail::empty_cpu({kStatsRows, x.shape.channels}, stats_type(x.tensor));
}

}  // namespace fused_res::cpu
