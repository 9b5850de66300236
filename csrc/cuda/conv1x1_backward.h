// Backward of a 1x1 convolution between two batch norms: dgrad and wgrad GEMMs over NHWC tensors. Neither the
// gradient with respect to the convolution output nor the activation that the convolution read exists in
// memory: operand prologues (operand_prologue.cuh) compute both from the pre-normalization tensors and the
// batch statistics.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/gemm_partition.h"

namespace fused_res::cuda {

// The gradient dz with respect to the convolution output z, as arguments of its operand prologue: dz is the
// backward of the norm (and ReLU) after the convolution, applied to dy. Without z and stats there is no
// prologue: dz is dy.
struct ConvOutputGradArgs {
  const void *dy, *z;   // (rows, channels): gradient of the norm's output; the norm's input, or null
  const float* stats;   // (5, channels), or null
  const float* sums;    // (2, channels): sum of dy, of dy * xhat; or null: the statistics are constants
  const uint8_t* mask;  // relu_mask that applies to dy, or null
  bool relu;            // without a mask: dy is masked by the recomputed sign of bn(z)
  float inv_count;      // 1 / number of values that `sums` are over
  int64_t rows;
  int channels;
};

struct DgradArgs {
  ConvOutputGradArgs gradient;
  const void* weight;         // (channels of the gradient, channels)
  void* dx;                   // (rows, channels)
  const void* x;              // (rows, channels): input of the norm before the convolution, or null
  const float* x_stats;       // (5, channels)
  bool x_relu;                // a ReLU follows that norm: it masks dx
  float* partials;            // (row tiles, 2, channels): partial backward sums of that norm
  const void* added;          // (rows, channels), residual gradient added to dx; or null
  const uint8_t* added_mask;  // its relu_mask, or null
  int channels, col_tiles;
  bool vectorized;  // x, added and dx allow 16-byte accesses along the channels
};

struct WgradArgs {
  ConvOutputGradArgs gradient;
  const void* input;         // (images, height, width, channels)
  const float* input_stats;  // (5, channels): batch norm of the input, applied as prologue; or null
  bool input_relu;
  float* split_k_workspace;  // (splits + 1, channels of the gradient, channels); or null: K is not split
  Epilogue epilogue;         // writes dw, (channels of the gradient, channels)
  int channels, height, width, out_height, out_width, stride_height, stride_width;
  int col_tiles, steps_per_split;
};

// With more splits, a separate reduction with more threads adds them before the epilogue.
constexpr int64_t kMaxEpilogueSplits = 16;

// `aligned`: all operands allow 16-byte vectorized loads along the channels; without it, only the smallest
// tile is instantiated.
void launch_dgrad(const DgradArgs& args, const GemmPartition& partition, MathMode math_mode, bool aligned,
                  Stream stream);
void launch_wgrad(const WgradArgs& args, const GemmPartition& partition, MathMode math_mode, bool aligned,
                  Stream stream);

}  // namespace fused_res::cuda
