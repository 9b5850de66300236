#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

// Whether it is beyond doubt that the tensor is rows of channels. The output is, if either operand is: the
// same rule as fused_res.ops.makes_channels_last.
bool is_rows(const Tensor& tensor) { return tensor.stride(1) == 1 && !tensor.is_contiguous(); }

// act(conv(x, w) + bias [+ residual]), in one kernel, or two where few outputs need their sums split.
Tensor conv_bias_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, bool relu) {
  const auto [output, none] = convolve(
      {input, weight, bias, residual, std::nullopt, false, stride, padding, dilation, groups, relu, false});
  return laid_out(output, is_rows(input) || is_rows(weight));
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_bias_act", TORCH_FN(conv_bias_act)); }

}  // namespace fused_res::cuda
