// Operators for max pooling with an optional prologue, normalize + ReLU, and indices of one byte. The kernels
// are in isa/max_pool.h.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/output_size.h"
#include "cpu/batch_norm.h"

namespace fused_res::cpu {
namespace {

PoolArgs pool_args(const ActivationTensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(x.tensor.dim() == 4, "input: expected (N, C, H, W), got ", x.tensor.sizes());
  TORCH_CHECK_VALUE(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
                    "kernel_size, stride, padding: expected two integers each");
  PoolArgs args = {};
  args.images = x.shape.images, args.channels = x.shape.channels;
  args.height = x.tensor.size(2), args.width = x.tensor.size(3);
  args.kernel_h = kernel[0], args.kernel_w = kernel[1];
  args.stride_h = stride[0], args.stride_w = stride[1];
  args.pad_h = padding[0], args.pad_w = padding[1];
  TORCH_CHECK_VALUE(kernel[0] > 0 && kernel[1] > 0 && kernel[0] * kernel[1] <= 255,
                    "kernel_size: expected a window of 1 to 255 values, got ", kernel);
  TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0, "stride: expected positive integers, got ", stride);
  TORCH_CHECK_VALUE(
      padding[0] >= 0 && padding[1] >= 0 && 2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
      "padding: expected at most half of kernel_size, ", kernel, ", got ", padding);
  args.out_height = output_size(args.height, args.kernel_h, args.stride_h, args.pad_h, 1);
  args.out_width = output_size(args.width, args.kernel_w, args.stride_w, args.pad_w, 1);
  TORCH_CHECK_VALUE(args.out_height > 0 && args.out_width > 0,
                    "input: expected images at least as large as the window, ", kernel, " with padding ",
                    padding, ", got ", x.tensor.sizes());
  return args;
}

const MaxPoolKernels& kernels_for(const ActivationTensor& x) {
  return kernels().max_pool[static_cast<int>(x.dtype)][static_cast<int>(x.shape.layout)];
}

// The number of rows of pixels that the kernels iterate over: rows of images (NHWC) or of planes (NCHW).
int64_t pixel_rows(const ActivationTensor& x, int64_t height) {
  return (x.shape.layout == Layout::kNhwc ? x.shape.images : x.shape.images * x.shape.channels) * height;
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input, const OptionalTensor& stats, bool relu,
                                            at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                            at::IntArrayRef padding) {
  const ActivationTensor x(input);
  PoolArgs args = pool_args(x, kernel_size, stride, padding);
  Tensor saved;
  if (stats && stats->defined()) {
    saved = checked_stats(*stats, x, "stats");
    const NormArgs norm = norm_args(saved);
    args.mean = norm.mean, args.scale = norm.scale, args.shift = norm.shift;
  }
  const std::array<int64_t, 4> sizes = {x.shape.images, x.shape.channels, args.out_height, args.out_width};
  Tensor output = empty_output(sizes, input.scalar_type(), x.format);
  Tensor indices = at::detail::empty_cpu(sizes, at::kByte, false, x.format);
  args.x = x.tensor.const_data_ptr();
  args.relu = relu;
  args.y = output.data_ptr();
  args.indices = indices.data_ptr<uint8_t>();
  const auto forward = kernels_for(x).forward;
  Parallel{x.shape.numel()}(pixel_rows(x, args.out_height),
                            [&](int64_t begin, int64_t end) { forward(args, begin, end); });
  return {output, indices};
}

Tensor max_pool_backward(const Tensor& grad_output, const Tensor& indices, const Tensor& input,
                         at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding) {
  const ActivationTensor x(input);
  PoolArgs args = pool_args(x, kernel_size, stride, padding);
  const std::array<int64_t, 4> sizes = {x.shape.images, x.shape.channels, args.out_height, args.out_width};
  TORCH_CHECK_VALUE(grad_output.sizes().equals(sizes) && grad_output.is_cpu(),
                    "grad_output: expected the shape of the output, ", at::IntArrayRef(sizes), ", got ",
                    grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "grad_output: expected the dtype of input, ", input.scalar_type(), ", got ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(indices.sizes().equals(sizes) && indices.is_cpu() && indices.scalar_type() == at::kByte,
                    "indices: expected uint8 of the output's shape, ", at::IntArrayRef(sizes), ", got ",
                    indices.sizes(), " of ", indices.scalar_type());
  const Tensor dy = grad_output.contiguous(x.format), window_indices = indices.contiguous(x.format);
  Tensor dx = empty_output(x.tensor);
  args.x = dy.const_data_ptr();
  args.y = dx.data_ptr();
  args.indices = const_cast<uint8_t*>(window_indices.const_data_ptr<uint8_t>());
  const auto backward = kernels_for(x).backward;
  Parallel{x.shape.numel()}(pixel_rows(x, args.height),
                            [&](int64_t begin, int64_t end) { backward(args, begin, end); });
  return restore_strides(dx, input, x.tensor);
}

}  // namespace
}  // namespace fused_res::cpu

TORCH_LIBRARY_IMPL(fused_res_cpu, CPU, m) {
  using namespace fused_res::cpu;
  m.impl("max_pool_forward", TORCH_FN(max_pool_forward));
  m.impl("max_pool_backward", TORCH_FN(max_pool_backward));
}
