#include <ATen/ops/zeros.h>

#include "cuda/batch_norm_sync.h"
#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

// A convolution that normalises its input as it reads it, and takes its output's statistics from the sums.
std::tuple<Tensor, Tensor> conv_bn_stats(const Tensor& input, const Tensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& input_stats,
                                         bool input_relu, at::IntArrayRef stride, at::IntArrayRef padding,
                                         at::IntArrayRef dilation, int64_t groups, bool partials) {
  const auto [output, of_tiles] = convolve({input, weight, bias, std::nullopt, input_stats, input_relu,
                                            stride, padding, dilation, groups, false, partials});
  if (!partials) return {laid_out(output, is_channels_last(input)), nothing(input, at::kDouble)};
  if (output.numel() == 0)
    return {laid_out(output, is_channels_last(input)),
            at::zeros({1, 3, output.size(1)}, input.options().dtype(at::kDouble))};
  const OnDeviceOf device(input);
  return {laid_out(output, is_channels_last(input)), merge_parts(of_tiles, device.stream())};
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_bn_stats", TORCH_FN(conv_bn_stats)); }

}  // namespace fused_res::cuda
