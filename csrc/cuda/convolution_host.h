// Host side that conv_bias_act and conv_bn_stats share, and argument checks of all convolution operators.
#pragma once

#include <tuple>

#include "cuda/gemm_partition.h"
#include "cuda/host.h"

namespace fused_res::cuda {

// Arguments of a forward convolution.
struct Convolution {
  const Tensor &input, &weight;
  const OptionalTensor &bias, &residual, &input_stats;
  bool input_relu;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool relu, partials;
};

// Run a convolution. Returns the channels_last output and, if `partials`, the partial statistics of its
// tiles, float32 (tiles, 4, channels), else an empty placeholder. Raises TypeError or ValueError for
// unsupported arguments: input that is not 4-D or not of a 16- or 32-bit floating-point dtype, or an empty
// output.
std::tuple<Tensor, Tensor> convolve(const Convolution& convolution);

// Return `number` as int, after checking its range. Pixel coordinates and K indices are 32-bit in the
// kernels; tensor offsets are 64-bit.
int narrow(int64_t number, const char* name);

// Check that a tensor is 4-D and float32, bfloat16 or float16.
void check_4d_tensor(const Tensor& tensor, const char* name);

// Return the math mode of a tensor's dtype. float32 uses IEEE float32 unless PyTorch's setting for
// convolutions allows TF32.
MathMode math_mode_of(const Tensor& tensor);

// Whether the tensor's address allows 16-byte vectorized accesses.
bool is_aligned(const Tensor& tensor);

// Return a float32 matrix (rows, channels), checked, contiguous and aligned to 32 bytes for vectorized loads.
Tensor aligned_channel_rows(const Tensor& tensor, const Tensor& input, int64_t rows, int64_t channels,
                            const char* name);

}  // namespace fused_res::cuda
