// Operator conv_wgrad: weight gradient of a 1x1 convolution between two batch norms.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/output_size.h"
#include "cuda/conv_output_grad.h"

namespace fused_res::cuda {
namespace {

// Return the gradient of the convolution's weight, from the gradient of the output of the norm after it.
Tensor conv_wgrad(const Tensor& grad_output, const Tensor& output, const Tensor& stats,
                  const OptionalTensor& relu_mask, bool relu, const OptionalTensor& sums, int64_t count,
                  const Tensor& weight, const Tensor& input, const OptionalTensor& input_stats,
                  bool input_relu, at::IntArrayRef stride) {
  const DeviceGuard device(output);
  const ConvOutputGradOperands gradient(grad_output, output, stats, relu_mask, relu, sums, count, weight);
  check_4d_tensor(input, "input");
  check_device(input, output, "input");
  TORCH_CHECK_TYPE(input.scalar_type() == output.scalar_type(), "input: expected the dtype of output, ",
                   output.scalar_type(), ", got ", input.scalar_type());
  TORCH_CHECK_VALUE(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                    "stride: expected two positive numbers, got ", stride);
  const int64_t channels = weight.size(1), outputs = weight.size(0);
  for (int d = 2; d < 4; ++d) {
    TORCH_CHECK_VALUE(output_size(input.size(d), 1, stride[d - 2], 0, 1) == output.size(d),
                      "input: ", input.sizes(), " with stride ", stride, " does not make ", output.sizes());
  }
  TORCH_CHECK_VALUE(input.size(0) == output.size(0) && input.size(1) == channels, "input: expected ",
                    output.size(0), " images of ", channels, " channels, got ", input.sizes());
  const Tensor x = to_memory_format(input, true);
  Tensor x_stats;
  if (input_stats.has_value())
    x_stats = aligned_channel_rows(*input_stats, output, 5, channels, "input_stats");
  // A 1x1 weight is an (outputs, channels) matrix in memory, whichever memory format it has.
  Tensor dw = at::empty_like(weight, weight.suggest_memory_format());

  if (output.numel() == 0) return dw.zero_();
  const MathMode math_mode = math_mode_of(output);
  const bool vectorizable = channels * element_size(math_mode) % 16 == 0;
  const bool aligned = vectorizable && gradient.aligned() && is_aligned(x);
  const GemmPartition partition =
      partition_wgrad_gemm({outputs, channels, gradient.args().rows, 1, math_mode, aligned, true});
  Tensor split_k_workspace;
  if (partition.splits > 1) {
    split_k_workspace =
        at::empty({partition.splits + 1, outputs, channels}, output.options().dtype(at::kFloat));
  }
  WgradArgs args = {};
  args.gradient = gradient.args();
  args.input = x.const_data_ptr();
  args.input_stats = x_stats.defined() ? x_stats.const_data_ptr<float>() : nullptr;
  args.input_relu = input_relu;
  args.split_k_workspace =
      split_k_workspace.defined() ? split_k_workspace.mutable_data_ptr<float>() : nullptr;
  args.epilogue.output = dw.mutable_data_ptr();
  args.epilogue.rows = outputs;
  args.epilogue.channels = channels;
  args.epilogue.vectorized = vectorizable;
  args.channels = narrow(channels, "channels");
  args.height = narrow(x.size(2), "height");
  args.width = narrow(x.size(3), "width");
  args.out_height = narrow(output.size(2), "height");
  args.out_width = narrow(output.size(3), "width");
  args.stride_height = narrow(stride[0], "stride");
  args.stride_width = narrow(stride[1], "stride");
  args.col_tiles = static_cast<int>(partition.col_tiles);
  args.steps_per_split = narrow(partition.steps_per_split, "steps");
  launch_wgrad(args, partition, math_mode, aligned, device.stream());
  return dw;
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_wgrad", TORCH_FN(conv_wgrad)); }

}  // namespace fused_res::cuda
