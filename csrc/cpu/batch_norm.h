// Helpers of the batch norm operators (batch_norm_*.cpp): conversion of tensors to kernel arguments. Python
// has validated the arguments of the public functions; here only those errors are checked that would crash a
// kernel.
#pragma once

#include <memory>
#include <string_view>

#include "cpu/caches.h"
#include "cpu/isa.h"
#include "cpu/tensor.h"

namespace fused_res::cpu {

inline bool use_streaming_stores(const ActivationTensor& x, const Tensor& output) {
  const int64_t line = 64, row_bytes = x.shape.cols() * output.element_size();
  return caches().streams_norm_output(static_cast<int64_t>(output.nbytes())) && row_bytes % line == 0 &&
         reinterpret_cast<uintptr_t>(output.data_ptr()) % line == 0;
}

inline const BatchNormActKernels& norm_kernels(const ActivationTensor& x) {
  return kernels().batch_norm_act[static_cast<int>(x.dtype)][static_cast<int>(x.shape.layout)];
}

// A pointer to a row of a contiguous matrix.
inline void* matrix_row(const Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.data_ptr()) + row * matrix.size(1) * matrix.element_size();
}

inline NormArgs norm_args(const Tensor& stats) {
  if (!stats.defined()) return {};
  return {matrix_row(stats, kMean), matrix_row(stats, kScale), matrix_row(stats, kShift)};
}

inline Tensor checked_stats(const Tensor& stats, const ActivationTensor& x, const char* name) {
  TORCH_CHECK_VALUE(stats.is_cpu() && stats.scalar_type() == stats_type(x.tensor) && stats.dim() == 2 &&
                        stats.size(0) == kStatsRows && stats.size(1) == x.shape.channels,
                    name, ": expected (5, ", x.shape.channels, ") of ", stats_type(x.tensor),
                    " on the CPU, got ", stats.sizes(), " of ", stats.scalar_type());
  return stats.contiguous();
}

inline const uint8_t* checked_mask(const OptionalTensor& mask, const ActivationTensor& x) {
  if (!mask || !mask->defined()) return nullptr;
  TORCH_CHECK_VALUE(mask->is_cpu() && mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                        mask->numel() == x.mask_bytes(),
                    "relu_mask: expected a contiguous uint8 tensor of ", x.mask_bytes(),
                    " bytes on the CPU, got ", mask->sizes(), " of ", mask->scalar_type());
  return mask->const_data_ptr<uint8_t>();
}

// The activation whose derivative is recomputed; with a mask it is that of the mask.
inline Activation parse_backward_activation(std::string_view name, const OptionalTensor& relu_mask) {
  const bool has_mask = relu_mask && relu_mask->defined();
  return has_mask ? parse_relu_or_identity(name, "with a ReLU mask") : parse_activation(name);
}

// The rows `slope` and `offset` of NormBackwardArgs, (2, C), from the sums (2, C), sum dy and sum dy * xhat,
// of `count` values per channel; undefined without sums.
inline Tensor norm_coefficients(const OptionalTensor& sums, const Tensor& stats, int64_t count,
                                int64_t channels) {
  if (!sums || !sums->defined()) return {};
  TORCH_CHECK_VALUE(sums->is_cpu() && sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == channels,
                    "sums: expected (2, ", channels, ") on the CPU, got ", sums->sizes());
  Tensor coefficients = at::detail::empty_cpu({2, channels}, stats.scalar_type());
  const FinalizeBackwardArgs out = {.stats = stats.const_data_ptr(),
                                    .slope = matrix_row(coefficients, 0),
                                    .offset = matrix_row(coefficients, 1),
                                    .dweight = nullptr,
                                    .dbias = nullptr};
  // The kernel expects sum dy * (x - mean), which is sum dy * xhat / invstd.
  const Tensor sums_f64 = sums->to(at::kDouble).contiguous();
  const Tensor sum_dy_xmu = sums_f64[1].div(stats[kInvstd]);
  kernels().finalize_backward[stats.scalar_type() == at::kDouble](
      out, sums_f64.const_data_ptr<double>(), sum_dy_xmu.const_data_ptr<double>(), static_cast<double>(count),
      channels, 0, channels);
  return coefficients;
}

inline std::unique_ptr<double[]> make_uninitialized(int64_t count) {
  return std::unique_ptr<double[]>(new double[count]);
}

}  // namespace fused_res::cpu
