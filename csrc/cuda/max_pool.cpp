// Host side of max pooling after an optional batch norm + ReLU, with one-byte indices.
#include "cuda/max_pool.h"

#include <array>
#include <tuple>

#include "common/output_size.h"
#include "cuda/activation_tensor.h"

namespace fused_res::cuda {
namespace {

MaxPoolArgs pool_args(const ActivationTensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                      at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(x.tensor.dim() == 4, "input: expected (N, C, H, W), got ", x.tensor.sizes());
  TORCH_CHECK_VALUE(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
                    "kernel_size, stride, padding: expected two numbers each");
  TORCH_CHECK_VALUE(kernel[0] > 0 && kernel[1] > 0 && kernel[0] * kernel[1] <= 255,
                    "kernel_size: expected a window of 1 to 255 values, got ", kernel);
  constexpr int64_t kMax = 1 << 30;
  TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0 && stride[0] < kMax && stride[1] < kMax,
                    "stride: expected positive numbers, got ", stride);
  TORCH_CHECK_VALUE(
      padding[0] >= 0 && padding[1] >= 0 && 2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
      "padding: expected at most half of kernel_size, ", kernel, ", got ", padding);
  MaxPoolArgs args = {};
  args.channels_last = x.shape.channels_last;
  args.images = x.shape.images, args.channels = x.shape.channels;
  args.height = x.tensor.size(2), args.width = x.tensor.size(3);
  TORCH_CHECK_VALUE(args.height < kMax && args.width < kMax, "input: expected smaller images, got ",
                    x.tensor.sizes());
  args.kernel_h = static_cast<int>(kernel[0]), args.kernel_w = static_cast<int>(kernel[1]);
  args.stride_h = static_cast<int>(stride[0]), args.stride_w = static_cast<int>(stride[1]);
  args.pad_h = static_cast<int>(padding[0]), args.pad_w = static_cast<int>(padding[1]);
  args.out_height = output_size(args.height, args.kernel_h, args.stride_h, args.pad_h, 1);
  args.out_width = output_size(args.width, args.kernel_w, args.stride_w, args.pad_w, 1);
  TORCH_CHECK_VALUE(args.out_height > 0 && args.out_width > 0,
                    "input: expected images at least as large as the window, ", kernel, " with padding ",
                    padding, ", got ", x.tensor.sizes());
  return args;
}

// Return the number of elements per access: adjacent channels in channels_last memory, one element in
// contiguous memory.
int pool_vector_size(const ActivationTensor& x, std::initializer_list<const void*> others) {
  return x.shape.channels_last ? x.vector_size(x.shape.channels, others) : 1;
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input, const OptionalTensor& stats, bool relu,
                                            at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                            at::IntArrayRef padding) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  MaxPoolArgs args = pool_args(x, kernel_size, stride, padding);
  const Tensor saved = stats && stats->defined() ? checked_stats(*stats, x, "stats") : Tensor();
  const std::array<int64_t, 4> sizes = {args.images, args.channels, args.out_height, args.out_width};
  const auto format = args.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor output = at::empty(sizes, input.options(), format);
  const Tensor indices = at::empty(sizes, input.options().dtype(at::kByte), format);
  args.stats = data_or_null(saved), args.relu = relu;
  args.x = x.data(), args.y = output.data_ptr(), args.indices = indices.mutable_data_ptr<uint8_t>();
  args.vector_size = pool_vector_size(x, {args.y, args.indices});
  if (output.numel() > 0) launch_max_pool_forward(x.dtype, args, device.stream());
  return {output, indices};
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& indices, const Tensor& input,
                         at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding) {
  const DeviceGuard device(input);
  const ActivationTensor x(input);
  MaxPoolArgs args = pool_args(x, kernel_size, stride, padding);
  const std::array<int64_t, 4> sizes = {args.images, args.channels, args.out_height, args.out_width};
  check_device(grad_output, input, "grad_output"), check_device(indices, input, "indices");
  TORCH_CHECK_VALUE(grad_output.sizes().equals(sizes), "grad_output: expected the shape of the output, ",
                    at::IntArrayRef(sizes), ", got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output: expected the dtype of input, ", input.scalar_type(), ", got ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(indices.sizes().equals(sizes) && indices.scalar_type() == at::kByte,
                    "indices: expected uint8 of the output's shape, ", at::IntArrayRef(sizes), ", got ",
                    indices.sizes(), " of ", indices.scalar_type());
  const Tensor dy = to_memory_format(grad_output, args.channels_last),
               chosen = to_memory_format(indices, args.channels_last);
  const Tensor dx = at::empty_like(x.tensor);
  args.x = dy.const_data_ptr(), args.y = dx.data_ptr();
  args.indices = const_cast<uint8_t*>(chosen.const_data_ptr<uint8_t>());
  args.vector_size = pool_vector_size(x, {args.x, args.y, args.indices});
  if (dx.numel() > 0) launch_max_pool_backward(x.dtype, args, device.stream());
  return restore_strides(dx, input, x.tensor);
}

}  // namespace

FUSED_RES_LIBRARY_IMPL(m) {
  m.impl("max_pool_forward", TORCH_FN(max_pool_forward));
  m.impl("max_pool_backward", TORCH_FN(max_pool_backward));
}

}  // namespace fused_res::cuda
