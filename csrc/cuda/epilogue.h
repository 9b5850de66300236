// What follows the sums of a convolution.
#pragma once

#include "cuda/product.h"

namespace fused_res::cuda {

struct Epilogue {
  void* output;  // (rows, channels)
  Parameter bias;
  const void* residual;  // like the output, or null
  float* partials;       // (row tiles, 4, channels): count, mean, M2 and the mean's rest of each; or null
  int64_t rows;
  int64_t channels;
  bool relu;
  bool vectors;  // 16 bytes of channels may be written at once
};

// Rows that share partial statistics where a sum is split.
constexpr int64_t kSplitRows = 64;

// Adds up what splits of sums, (splits, rows, channels), have found, in their order, and goes on as one block
// would have.
void launch_split_sums(Arithmetic arithmetic, const float* sums, int64_t splits, const Epilogue& epilogue,
                       Stream stream);

}  // namespace fused_res::cuda
