// Operator conv_dgrad: input gradient of a 1x1 convolution between two batch norms, either of which is
// optional.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/batch_norm_sync.h"
#include "cuda/conv_output_grad.h"

namespace fused_res::cuda {
namespace {

// Return the gradient of the convolution's input, and the backward sums of the norm before the convolution,
// from the gradient of the output of the norm after it, or, without `output`, of the convolution's output.
std::tuple<Tensor, Tensor> conv_dgrad(const Tensor& grad_output, const OptionalTensor& output,
                                      const OptionalTensor& stats, const OptionalTensor& relu_mask, bool relu,
                                      const OptionalTensor& sums, int64_t count, const Tensor& weight,
                                      const OptionalTensor& input, const OptionalTensor& input_stats,
                                      bool input_relu, const OptionalTensor& added,
                                      const OptionalTensor& added_mask) {
  const DeviceGuard device(grad_output);
  const ConvOutputGradOperands gradient(grad_output, output, stats, relu_mask, relu, sums, count, weight);
  const Tensor w = weight.flatten(1).contiguous();
  const int64_t channels = w.size(1);
  Tensor dx = at::empty({grad_output.size(0), channels, grad_output.size(2), grad_output.size(3)},
                        grad_output.options(), at::MemoryFormat::ChannelsLast);
  Tensor x, x_stats, residual_grad;
  if (input.has_value() && input_stats.has_value()) {
    check_like(*input, dx, "input");
    x = to_memory_format(*input, true);
    x_stats = aligned_channel_rows(*input_stats, dx, 5, channels, "input_stats");
  }
  if (added.has_value()) {
    check_like(*added, dx, "added");
    residual_grad = to_memory_format(*added, true);
  }

  const auto floats = dx.options().dtype(at::kFloat);
  if (grad_output.numel() == 0)
    return {dx, x.defined() ? at::zeros({2, channels}, floats) : empty_placeholder(dx, at::kFloat)};
  const MathMode math_mode = math_mode_of(dx);
  const bool vectorizable = channels * element_size(math_mode) % 16 == 0;
  const bool aligned = vectorizable && gradient.aligned() && is_aligned(w);
  const GemmPartition partition = partition_activation_gemm(
      {gradient.args().rows, channels, gradient.args().channels, 1, math_mode, aligned, true}, false);
  const Tensor partials =
      x.defined() ? at::empty({partition.row_tiles, 2, channels}, floats) : empty_placeholder(dx, at::kFloat);
  DgradArgs args = {};
  args.gradient = gradient.args();
  args.weight = w.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  if (x.defined()) {
    args.x = x.const_data_ptr();
    args.x_stats = x_stats.const_data_ptr<float>();
    args.partials = partials.mutable_data_ptr<float>();
  }
  args.x_relu = input_relu;
  args.added = residual_grad.defined() ? residual_grad.const_data_ptr() : nullptr;
  args.added_mask = residual_grad.defined() ? checked_row_mask(added_mask, dx, "added_mask") : nullptr;
  args.channels = narrow(channels, "channels");
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.vectorized = vectorizable && (!x.defined() || is_aligned(x)) &&
                    (!residual_grad.defined() || is_aligned(residual_grad));
  launch_dgrad(args, partition, math_mode, aligned, device.stream());
  return {dx, x.defined() ? sum_partials(partials, device.stream()) : partials};
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_dgrad", TORCH_FN(conv_dgrad)); }

}  // namespace fused_res::cuda
