// Operator conv_bias_act: convolution with fused bias, residual and ReLU, for inference.
#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

// Whether the tensor is channels_last and not also contiguous. The output is channels_last if input or weight
// is: the same rule as fused_res.ops.conv_output_is_channels_last.
bool is_strictly_channels_last(const Tensor& tensor) {
  return tensor.stride(1) == 1 && !tensor.is_contiguous();
}

// act(conv(x, w) + bias [+ residual]), in one kernel, or two where few output tiles require split-K.
Tensor conv_bias_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, bool relu) {
  const auto [output, no_partials] = convolve(
      {input, weight, bias, residual, std::nullopt, false, stride, padding, dilation, groups, relu, false});
  return to_memory_format(output, is_strictly_channels_last(input) || is_strictly_channels_last(weight));
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_bias_act", TORCH_FN(conv_bias_act)); }

}  // namespace fused_res::cuda
