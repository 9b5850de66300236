// Forward convolution as an implicit GEMM over NHWC (channels_last) tensors: M is the output pixels, N the
// output channels of a group, and K the filter taps times the input channels of the group, which are
// contiguous in memory.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/gemm_partition.h"

namespace fused_res::cuda {

struct ConvolutionArgs {
  const void* input;         // (images, height, width, channels)
  const void* weight;        // (output channels, kernel height, kernel width, channels of a group)
  const float* input_stats;  // (5, channels): batch norm of the input, applied as operand prologue; or null
  bool input_relu;           // the prologue ends with a ReLU
  float*
      split_k_workspace;  // (splits, rows, output channels) of partial accumulators; or null: K is not split
  Epilogue epilogue;
  int channels, group_channels, group_out_channels, groups;
  int gemm_k;  // kernel_height * kernel_width * group_channels
  int height, width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width;
  int pad_height, pad_width, dilation_height, dilation_width;
  int col_tiles, steps_per_split;
};

// Launch the convolution and, with split-K, the reduction kernel. `aligned`: input and weight allow 16-byte
// vectorized loads along the channels; without it, only the smallest tile is instantiated.
void launch_convolution(const ConvolutionArgs& args, const GemmPartition& partition, MathMode math_mode,
                        bool aligned, Stream stream);

}  // namespace fused_res::cuda
