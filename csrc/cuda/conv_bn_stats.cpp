// Operator conv_bn_stats: convolution with batch norm + ReLU prologue and partial statistics epilogue, for
// training.
#include <ATen/ops/zeros.h>

#include "cuda/batch_norm_sync.h"
#include "cuda/convolution_host.h"

namespace fused_res::cuda {
namespace {

// Normalizes the input in the operand prologue, and computes the partial statistics of the output, rounded as
// it is stored, in the epilogue.
std::tuple<Tensor, Tensor> conv_bn_stats(const Tensor& input, const Tensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& input_stats,
                                         bool input_relu, at::IntArrayRef stride, at::IntArrayRef padding,
                                         at::IntArrayRef dilation, int64_t groups, bool partials) {
  const auto [output, tile_partials] = convolve({input, weight, bias, std::nullopt, input_stats, input_relu,
                                                 stride, padding, dilation, groups, false, partials});
  if (!partials)
    return {to_memory_format(output, is_channels_last(input)), empty_placeholder(input, at::kDouble)};
  if (output.numel() == 0)
    return {to_memory_format(output, is_channels_last(input)),
            at::zeros({1, 3, output.size(1)}, input.options().dtype(at::kDouble))};
  const DeviceGuard device(input);
  return {to_memory_format(output, is_channels_last(input)),
          merge_partial_stats(tile_partials, device.stream())};
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) { m.impl("conv_bn_stats", TORCH_FN(conv_bn_stats)); }

}  // namespace fused_res::cuda
