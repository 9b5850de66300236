#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/batch_norm_sync.h"
#include "cuda/gradient_operands.h"

namespace fused_res::cuda {
namespace {

// Gradient of a 1x1 convolution's input, from the gradient behind the norm that follows it.
std::tuple<Tensor, Tensor> conv_dgrad(const Tensor& grad_output, const Tensor& output, const Tensor& stats,
                                      const OptionalTensor& relu_mask, bool relu, const OptionalTensor& sums,
                                      int64_t count, const Tensor& weight, const OptionalTensor& input,
                                      const OptionalTensor& input_stats, bool input_relu,
                                      const OptionalTensor& added, const OptionalTensor& added_mask) {
  const OnDeviceOf device(output);
  const GradientOperands gradient(grad_output, output, stats, relu_mask, relu, sums, count, weight);
  const Tensor w = weight.flatten(1).contiguous();
  const int64_t channels = w.size(1);
  Tensor dx = at::empty({output.size(0), channels, output.size(2), output.size(3)}, output.options(),
                        at::MemoryFormat::ChannelsLast);
  Tensor x, x_stats, more;
  if (input.has_value() && input_stats.has_value()) {
    check_like(*input, dx, "input");
    x = laid_out(*input, true);
    x_stats = channel_rows(*input_stats, output, 5, channels, "input_stats");
  }
  if (added.has_value()) {
    check_like(*added, dx, "added");
    more = laid_out(*added, true);
  }

  if (output.numel() == 0) {
    const auto floats = output.options().dtype(at::kFloat);
    return {dx, x.defined() ? at::zeros({2, channels}, floats) : nothing(output, at::kFloat)};
  }
  const Arithmetic arithmetic = arithmetic_of(output);
  const bool whole = channels * element_size(arithmetic) % 16 == 0;
  const bool aligned = whole && gradient.aligned() && is_aligned(w);
  const ProductCut cut = cut_activation(
      {gradient.args().rows, channels, gradient.args().channels, 1, arithmetic, aligned, true}, false);
  const Tensor partials = x.defined()
                              ? at::empty({cut.row_tiles, 2, channels}, output.options().dtype(at::kFloat))
                              : nothing(output, at::kFloat);
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
  args.added = more.defined() ? more.const_data_ptr() : nullptr;
  args.added_mask = more.defined() ? row_mask(added_mask, dx, "added_mask") : nullptr;
  args.channels = narrow(channels, "channels");
  args.col_tiles = static_cast<int>(cut.col_tiles);
  args.vectors = whole && (!x.defined() || is_aligned(x)) && (!more.defined() || is_aligned(more));
  launch_dgrad(args, cut, arithmetic, aligned, device.stream());
  return {dx, x.defined() ? merge_sums(partials, device.stream()) : partials};
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_dgrad", TORCH_FN(conv_dgrad)); }

}  // namespace fused_res::cuda
