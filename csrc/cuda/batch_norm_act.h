// Batch norm + residual + activation, act(bn(x) [+ residual]), forward and backward (batch norm: Ioffe &
// Szegedy 2015, https://arxiv.org/abs/1502.03167): the kernels' argument structs and their launches. Pointers
// are to dense NCHW or NHWC tensors. A is the dtype of an activation's statistics and sums (Accumulator):
// float64 for float64, else float32. `stats`, (5, C): mean, invstd, scale, shift, var (StatsRow, merge.cuh).
#pragma once

#include "cuda/work_partition.h"

namespace fused_res::cuda {

// First stage of the batch statistics.
struct PartialsArgs {
  WorkPartition partition;
  const void* x;
  // (parts, 4, C) of A, the partial statistics of each part: count, mean, M2 (sum of squared deviations from
  // the mean) and the rounding error of the mean (exact mean = mean + error).
  void* partials;
};

// Second stage: merge the partial statistics of one group of parts to `stats`, or of several groups to
// `merged`.
struct MergeArgs {
  const void* partials;  // (parts, rows, C), float32 or float64; 3 rows, or 4 as above
  int rows;
  int64_t parts, parts_per_group, channels;
  void* stats;     // (5, C), for a single group; or null
  double* merged;  // (groups, 3, C), if `stats` is null
  Parameter weight, bias;
  double eps;
};

// Gradient of a per-channel parameter, of any floating-point dtype; `data` is null if it is not requested.
struct ParameterGrad {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// Gradients of the parameters of a norm and of the residual's norm: rows of the backward sums.
struct ParameterGrads {
  ParameterGrad weight, bias, residual_weight, residual_bias;

  bool requested() const {
    return weight.data != nullptr || bias.data != nullptr || residual_weight.data != nullptr ||
           residual_bias.data != nullptr;
  }
};

// Second stage of the backward sums: (parts, width) to (groups, width).
struct SumPartialsArgs {
  const void* partials;
  void* sums;
  int64_t parts, parts_per_group, width;
  ParameterGrads grads = {};  // outputs, for a single group of sums (2 or 3, channels)
  int64_t channels = 0;       // unused without gradients
};

// Compute `stats` from given mean and variance (running statistics), weight and bias.
struct FoldArgs {
  bool active;
  Parameter mean, var, weight, bias;
  double eps;
  void* stats;  // output, (5, C) of A, or null
  int64_t channels;
};

struct ApplyArgs {
  WorkPartition partition;
  const void* x;
  void* y;
  const void *residual, *residual_stats;  // of x's shape; statistics of its norm, (5, C) of A; or null
  const void* stats;                      // (5, C) of A; unused if `fold` is active
  FoldArgs fold;
  uint8_t* mask;  // output, relu_mask, or null
  bool relu;
};

struct BackwardArgs {
  WorkPartition partition;
  const void *dy, *x, *stats;
  const void *residual, *residual_stats;  // input and statistics of the residual's norm, or null
  const uint8_t* mask;                    // relu_mask, or null
  bool relu;                              // without a mask: dy is masked by the recomputed sign of bn(x)
  void* partials;                         // (parts, 2 or 3, C) of A: sum of dy, dy * xhat, dy * residual xhat
  void* sums;                             // (2 or 3, C) of A
  void *dx, *dresidual;                   // outputs, null if not requested
  double count;                           // number of values that the sums are over
  // training: x's norm uses batch statistics, and dx is requested. residual_training: the residual's norm
  // uses batch statistics, and dresidual is requested.
  bool training, residual_training;
  int sums_rows;  // 2, or 3 with a normalized residual
};

// into += grad where the mask is set.
struct AddMaskedArgs {
  WorkPartition partition;
  void* into;
  const void* grad;
  const uint8_t* mask;  // relu_mask, or null
};

// Exponential moving average of the running statistics of several norms.
struct UpdateRunningArgs {
  static constexpr int kMaxNorms = 16;
  struct Norm {
    void *mean, *var;
    Dtype mean_dtype, var_dtype;
    const void* stats;
    bool is_double;
    int64_t channels;
    double momentum;
  };
  Norm norms[kMaxNorms];
};

void launch_partials(Dtype dtype, const PartialsArgs& args, Stream stream);
void launch_merge(bool double_partials, bool double_stats, const MergeArgs& args, Stream stream);
void launch_sum_partials(bool is_double, const SumPartialsArgs& args, Stream stream);
void launch_fold(bool double_stats, const FoldArgs& args, Stream stream);
void launch_apply(Dtype dtype, const ApplyArgs& args, Stream stream);
void launch_sums(Dtype dtype, const BackwardArgs& args, Stream stream);
void launch_dx(Dtype dtype, const BackwardArgs& args, Stream stream);
void launch_add_masked(Dtype dtype, const AddMaskedArgs& args, Stream stream);
// `norms`: number of norms in `args`. `channels`: the largest number of channels of any of them.
void launch_update_running(const UpdateRunningArgs& args, int norms, int64_t channels, Stream stream);

}  // namespace fused_res::cuda
