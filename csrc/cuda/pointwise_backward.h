// Backward of a 1x1 convolution between two norms. Neither the gradient of the convolution's output nor the
// activation that it read is in memory: both are formed from raw outputs and statistics as they are loaded.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/product.h"

namespace fused_res::cuda {

// The gradient of the convolution's output, from the one behind the norm that follows it.
struct GradientArgs {
  const void *dy, *z;   // (rows, channels): that gradient, the norm's input
  const float* stats;   // (5, channels)
  const float* sums;    // (2, channels) of dy and dy * xhat; or null: statistics that are constants
  const uint8_t* mask;  // relu_mask of dy, or null
  bool relu;            // without a mask: masked by the sign of the normalised z
  float share;          // 1 / count of the values that the sums are over
  int64_t rows;
  int channels;
};

struct DgradArgs {
  GradientArgs gradient;
  const void* weight;         // (gradient's channels, channels)
  void* dx;                   // (rows, channels)
  const void* x;              // like dx: what was normalised and read, or null
  const float* x_stats;       // (5, channels)
  bool x_relu;                // and went through a ReLU: masks dx
  float* partials;            // (row tiles, 2, channels) of the sums of that norm
  const void* added;          // like dx, to be added: the gradient of a shortcut; or null
  const uint8_t* added_mask;  // its relu_mask, or null
  int channels, col_tiles;
  bool vectors;  // 16 bytes of channels may be accessed at once
};

struct WgradArgs {
  GradientArgs gradient;
  const void* input;         // (images, height, width, channels)
  const float* input_stats;  // (5, channels), or null: the convolution read the input as it is
  bool input_relu;
  float* split_sums;  // (splits, gradient's channels, channels), with room for one more; or null
  Epilogue epilogue;  // writes dw, (gradient's channels, channels)
  int channels, height, width, out_height, out_width, stride_height, stride_width;
  int col_tiles, steps_per_split;
};

// More than that are added up before the epilogue, by more threads.
constexpr int64_t kFewSplits = 16;

// `aligned`: 16 bytes of channels of all operands may be read at once; there is only the smallest tile for
// others.
void launch_dgrad(const DgradArgs& args, const ProductCut& cut, Arithmetic arithmetic, bool aligned,
                  Stream stream);
void launch_wgrad(const WgradArgs& args, const ProductCut& cut, Arithmetic arithmetic, bool aligned,
                  Stream stream);

}  // namespace fused_res::cuda
