// Operators for act(bn(x) [+ residual]): with batch or running statistics, with given statistics, and in
// place. The kernels are in isa/batch_norm_forward.h, the two-pass scheme in partition.h.
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "cpu/batch_norm_stats.h"

namespace fused_res::cpu {
namespace {

// The residual operand: none, a tensor, or a tensor that is normalized with its own statistics.
struct Residual {
  Tensor tensor, stats;

  Residual(const ActivationTensor& x, const OptionalTensor& residual, const OptionalTensor& residual_stats) {
    if (residual && residual->defined()) tensor = x.checked_like(*residual, "residual");
    if (!residual_stats || !residual_stats->defined()) return;
    TORCH_CHECK_VALUE(tensor.defined(), "residual_stats: expected a residual with them");
    stats = checked_stats(*residual_stats, x, "residual_stats");
  }
};

// Undefined if it is not requested.
Tensor empty_mask(const ActivationTensor& x, bool requested) {
  return requested ? at::detail::empty_cpu({x.shape.rows(), x.mask_cols()}, at::kByte) : Tensor();
}

// The mask as an operator returns it.
Tensor mask_or_placeholder(const Tensor& mask) {
  return mask.defined() ? mask : empty_placeholder(at::kByte);
}

ForwardArgs forward_args(const ActivationTensor& x, const Residual& residual, const Tensor& stats,
                         std::string_view activation, double negative_slope, const Tensor& y,
                         const Tensor& mask) {
  const bool relu_or_identity = residual.tensor.defined() || mask.defined();
  return {.x = x.tensor.const_data_ptr(),
          .residual = data_or_null(residual.tensor),
          .norm = norm_args(stats),
          .residual_norm = norm_args(residual.stats),
          .y = y.data_ptr(),
          .mask = mask.defined() && mask.numel() > 0 ? mask.data_ptr<uint8_t>() : nullptr,
          .activation = relu_or_identity
                            ? parse_relu_or_identity(activation, "with a residual or a ReLU mask")
                            : parse_activation(activation),
          .negative_slope = negative_slope,
          .stream = !y.is_same(x.tensor) && use_streaming_stores(x, y)};
}

void run_forward(const ActivationTensor& x, const ForwardArgs& args) {
  const auto forward = norm_kernels(x).forward;
  one_pass(x.shape, Parallel(x.shape.numel()), [&](const Block& block) { forward(block, args); });
}

// --- the operators ---

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& residual_stats,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double eps, std::string_view activation,
    bool save_mask, double negative_slope) {
  const ActivationTensor x(input);
  const NormParams norm(x, weight, bias, running_mean, running_var, training, eps);
  const Residual added(x, residual, residual_stats);
  Tensor output = empty_output(x.tensor), stats = empty_stats(x), mask = empty_mask(x, save_mask);
  const ForwardArgs args = forward_args(x, added, stats, activation, negative_slope, output, mask);
  if (training && x.shape.numel() > 0) {
    const auto forward = norm_kernels(x).forward;
    with_batch_stats(x, norm, stats.data_ptr(), [&](const Block& block) { forward(block, args); });
  } else {
    finalize_running_stats(x, norm, stats.data_ptr());
    run_forward(x, args);
  }
  return {restore_strides(output, input, x.tensor), stats, mask_or_placeholder(mask)};
}

std::tuple<Tensor, Tensor> batch_norm_act_apply(const Tensor& input, const Tensor& stats,
                                                const OptionalTensor& residual,
                                                const OptionalTensor& residual_stats,
                                                std::string_view activation, bool save_mask,
                                                double negative_slope) {
  const ActivationTensor x(input);
  const Residual added(x, residual, residual_stats);
  Tensor output = empty_output(x.tensor), mask = empty_mask(x, save_mask);
  const Tensor checked = checked_stats(stats, x, "stats");
  run_forward(x, forward_args(x, added, checked, activation, negative_slope, output, mask));
  return {restore_strides(output, input, x.tensor), mask_or_placeholder(mask)};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& residual_stats, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean,
                               const Tensor& running_var, double eps, std::string_view activation,
                               double negative_slope) {
  const ActivationTensor x(input);
  const NormParams norm(x, weight, bias, running_mean, running_var, /*training=*/false, eps);
  const Residual added(x, residual, residual_stats);
  const Tensor stats = empty_stats(x);
  finalize_running_stats(x, norm, stats.data_ptr());
  run_forward(x, forward_args(x, added, stats, activation, negative_slope, x.tensor, {}));
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("batch_norm_act_forward", TORCH_FN(batch_norm_act_forward));
  m.impl("batch_norm_act_apply", TORCH_FN(batch_norm_act_apply));
  m.impl("batch_norm_act_inference_", TORCH_FN(batch_norm_act_inference_));
}
