// The host side that conv_bias_act and conv_bn_stats have in common.
#pragma once

#include <tuple>

#include "cuda/host.h"
#include "cuda/product.h"

namespace fused_res::cuda {

struct Convolution {
  const Tensor &input, &weight;
  const OptionalTensor &bias, &residual, &input_stats;
  bool input_relu;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool relu, partials;
};

// The output in channels_last memory and its tiles' statistics, float (tiles, 4, channels), or nothing.
// Raises TypeError or ValueError for what there is no kernel for: other than images in 16 or 32 bits, nothing
// to compute.
std::tuple<Tensor, Tensor> convolve(const Convolution& convolution);

// Coordinates of pixels, and sums' terms, are 32-bit numbers in the kernels; offsets are not.
int narrow(int64_t number, const char* what);

void check_images(const Tensor& tensor, const char* name);

// float32 products are exact unless PyTorch's own switch for convolutions allows TF32.
Arithmetic arithmetic_of(const Tensor& tensor);

// 16 bytes may be accessed at once wherever a multiple of that many elements is away from its beginning.
bool is_aligned(const Tensor& tensor);

// Rows of float32 numbers, one a channel, as kernels read them: several channels at once.
Tensor channel_rows(const Tensor& tensor, const Tensor& input, int64_t rows, int64_t channels,
                    const char* name);

}  // namespace fused_res::cuda
