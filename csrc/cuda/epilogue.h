// GEMM epilogue: its arguments, and the launch of the split-K reduction that ends with the same epilogue.
#pragma once

#include "cuda/gemm_partition.h"

namespace fused_res::cuda {

struct Epilogue {
  void* output;          // (rows, channels)
  Parameter bias;        // (channels), or null
  const void* residual;  // of the output's shape and dtype, or null
  float* partials;       // (row tiles, 4, channels) of partial statistics (see batch_norm_act.h), or null
  int64_t rows;
  int64_t channels;
  bool relu;
  bool vectorized;  // output and residual allow 16-byte accesses along the channels
};

// Row tile of the split-K reduction, which is also the number of rows of one set of partial statistics there.
constexpr int64_t kSplitKReduceRows = 64;

// Split-K reduction: add the partial accumulators, workspace (splits, rows, channels), in the order of the
// splits, then apply the epilogue.
void launch_split_k_reduce(MathMode math_mode, const float* workspace, int64_t splits,
                           const Epilogue& epilogue, Stream stream);

}  // namespace fused_res::cuda
