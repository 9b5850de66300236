// Convolutions as implicit matrix products: rows are output pixels, columns output channels, and what is
// summed over are the taps of the window and, in each, the input channels, which lie next to each other in
// channels_last memory.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/product.h"

namespace fused_res::cuda {

struct ConvolutionArgs {
  const void* input;         // (images, height, width, channels)
  const void* weight;        // (output channels, window, group's channels)
  const float* input_stats;  // (5, channels): the input is normalised as it is read; or null
  bool input_relu;
  float* split_sums;  // (splits, rows, output channels); or null: one block has all of a sum
  Epilogue epilogue;
  int channels, group_channels, group_outputs, groups;
  int depth;  // terms of a sum
  int height, width, out_height, out_width;
  int window_height, window_width, stride_height, stride_width;
  int pad_height, pad_width, dilation_height, dilation_width;
  int col_tiles, steps_per_split;
};

// Launches the convolution, and behind split sums what adds them up. `aligned`: 16 bytes of channels of input
// and weight may be read at once; there is only the smallest tile for others.
void launch_convolution(const ConvolutionArgs& args, const ProductCut& cut, Arithmetic arithmetic,
                        bool aligned, Stream stream);

}  // namespace fused_res::cuda
