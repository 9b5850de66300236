// Operators for a batch norm whose reductions are separate from its elementwise pass, so that partial
// statistics of a convolution's epilogue or of other processes can be merged in between: partial statistics
// and their merge, the sums of the backward, and dx from these sums.
#include <torch/library.h>

#include <algorithm>
#include <string_view>

#include "cpu/batch_norm_stats.h"

namespace fused_res::cpu {
namespace {

// Returns the partial statistics of a batch, (1, 3, C): count, mean and M2.
Tensor batch_norm_partials(const Tensor& input) {
  const ActivationTensor x(input);
  const int64_t channels = x.shape.channels;
  Tensor partials = at::detail::empty_cpu({1, 3, channels}, at::kDouble);
  double* out = partials.mutable_data_ptr<double>();
  std::fill_n(out, channels, static_cast<double>(x.shape.values_per_channel()));
  if (x.shape.numel() == 0) {
    std::fill_n(out + channels, 2 * channels, 0.0);
    return partials;
  }
  with_moments(
      x,
      [&](ChannelRange group, const double* moments) {
        for (const int64_t row : {0, 1}) {
          std::copy(moments + row * channels + group.begin, moments + row * channels + group.end,
                    out + (1 + row) * channels + group.begin);
        }
      },
      [](const Block&) {});
  return partials;
}

// Merges P partial statistics, (P, 3, C): count, mean and M2, from a convolution's epilogue or from several
// processes.
Tensor merge_stats(const Tensor& partials, const OptionalTensor& weight, const OptionalTensor& bias,
                   double eps, bool is_double) {
  TORCH_CHECK_VALUE(partials.dim() == 3 && partials.size(0) > 0 && partials.size(1) == 3 &&
                        partials.scalar_type() == at::kDouble && partials.is_cpu(),
                    "partials: expected (P, 3, C) of float64 on the CPU, got ", partials.sizes(), " of ",
                    partials.scalar_type());
  const Tensor parts = partials.contiguous();
  const int64_t channels = parts.size(2);
  const auto type = is_double ? at::kDouble : at::kFloat;
  const Tensor weights = channel_vector(weight, channels, type, "weight");
  const Tensor biases = channel_vector(bias, channels, type, "bias");
  Tensor stats = at::detail::empty_cpu({kStatsRows, channels}, type);
  if (channels == 0) return stats;
  const auto moments = make_uninitialized(2 * channels);
  std::fill_n(moments.get(), 2 * channels, 0.0);
  double count = 0;
  for (int64_t i = 0; i < parts.size(0); ++i) {
    const double* part = parts.const_data_ptr<double>() + i * 3 * channels;
    if (part[0] == 0) continue;
    if (count == 0) {
      std::copy_n(part + channels, 2 * channels, moments.get());
    } else {
      kernels().merge_partials(moments.get(), part + channels, count, part[0], channels, 0, channels);
    }
    count += part[0];
  }
  const AffineArgs params = {data_or_null(weights), data_or_null(biases), eps};
  kernels().finalize_stats[is_double](stats.data_ptr(), moments.get(), std::max(count, 1.0), params, channels,
                                      0, channels);
  return stats;
}

NormBackwardArgs norm_backward_args(const Tensor& x, const Tensor& stats) {
  return {
      .x = x.const_data_ptr(), .norm = norm_args(stats), .slope = nullptr, .offset = nullptr, .dx = nullptr};
}

// Returns the backward reductions, (2, C): sum dy and sum dy * xhat; for a pair (3, C), with sum dy * xhat of
// the residual's norm.
Tensor batch_norm_sums(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                       const OptionalTensor& relu_mask, std::string_view activation,
                       const OptionalTensor& residual, const OptionalTensor& residual_stats,
                       double negative_slope) {
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output");
  const bool pair = residual && residual->defined();
  TORCH_CHECK_VALUE(pair == (residual_stats && residual_stats->defined()),
                    "residual: expected together with residual_stats");
  const Tensor inputs[2] = {x.tensor, pair ? x.checked_like(*residual, "residual") : Tensor()};
  const Tensor saved[2] = {checked_stats(stats, x, "stats"),
                           pair ? checked_stats(*residual_stats, x, "residual_stats") : Tensor()};
  const int64_t norms = pair ? 2 : 1, rows = 1 + norms, channels = x.shape.channels;
  Tensor sums = at::detail::empty_cpu({rows, channels}, stats_type(x.tensor));
  if (x.shape.numel() == 0) return sums.zero_();

  BackwardArgs args = {.dy = dy.const_data_ptr(),
                       .mask = checked_mask(relu_mask, x),
                       .norms = {},
                       .dresidual = nullptr,
                       .activation = pair ? parse_relu_or_identity(activation, "with a residual")
                                          : parse_backward_activation(activation, relu_mask),
                       .negative_slope = negative_slope,
                       .stream = false};
  for (int64_t k = 0; k < norms; ++k) args.norms[k] = norm_backward_args(inputs[k], saved[k]);
  const auto reduce = norm_kernels(x).reduce[norms - 1];
  const Parallel parallel(x.shape.numel());
  const Partition partition(x.shape, rows * x.tensor.element_size(), parallel.threads());
  const auto partial = make_uninitialized(partition.chunks() * rows * channels);
  two_passes(
      partition, parallel,
      [&](const Block& block, int64_t chunk) { reduce(block, args, &partial[chunk * rows * channels]); },
      [&](ChannelRange group) {
        add_chunks(kernels(), partition, partial.get(), rows, group);
        for (int64_t k = 0; k < norms; ++k) {
          const FinalizeBackwardArgs out = {.stats = saved[k].const_data_ptr(),
                                            .slope = nullptr,
                                            .offset = nullptr,
                                            .dweight = matrix_row(sums, 1 + k),
                                            .dbias = matrix_row(sums, 0)};
          kernels().finalize_backward[stats_index(x.tensor)](out, partial.get(), &partial[(1 + k) * channels],
                                                             1.0, channels, group.begin, group.end);
        }
      },
      [](const Block&) {});
  return sums;
}

Tensor batch_norm_act_dx(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                         const OptionalTensor& relu_mask, std::string_view activation,
                         const OptionalTensor& sums, int64_t count, double negative_slope) {
  const ActivationTensor x(input);
  const Tensor dy = x.checked_like(grad_output, "grad_output"), saved = checked_stats(stats, x, "stats");
  Tensor dx = empty_output(x.tensor), coefficients = norm_coefficients(sums, saved, count, x.shape.channels);
  NormBackwardArgs norm = norm_backward_args(x.tensor, saved);
  norm.dx = dx.data_ptr();
  if (coefficients.defined())
    norm.slope = matrix_row(coefficients, 0), norm.offset = matrix_row(coefficients, 1);
  const BackwardArgs args = {.dy = dy.const_data_ptr(),
                             .mask = checked_mask(relu_mask, x),
                             .norms = {norm},
                             .dresidual = nullptr,
                             .activation = parse_backward_activation(activation, relu_mask),
                             .negative_slope = negative_slope,
                             .stream = use_streaming_stores(x, dx)};
  const auto backward = norm_kernels(x).backward[0];
  one_pass(x.shape, Parallel(x.shape.numel()), [&](const Block& block) { backward(block, args); });
  return restore_strides(dx, input, x.tensor);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_partials", TORCH_FN(batch_norm_partials));
  m.impl("merge_stats", TORCH_FN(merge_stats));
  m.impl("batch_norm_sums", TORCH_FN(batch_norm_sums));
  m.impl("batch_norm_act_dx", TORCH_FN(batch_norm_act_dx));
}
