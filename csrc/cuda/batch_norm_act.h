// act(bn(x) [+ residual]) and its backward: what the kernels are told, and their launches. Pointers are to
// dense memory in one of the two layouts; A is the dtype that the statistics of such a tensor are kept in.
#pragma once

#include "cuda/cut.h"

namespace fused_res::cuda {

// Stage one of the statistics.
struct PartialsArgs {
  Cut cut;
  const void* x;
  void*
      partials;  // A (parts, 4, C): count, mean, sum of squared deviations, what rounding took from the mean
};

// Stage two, of one group of parts or of several.
struct MergeArgs {
  const void* partials;  // (parts, rows, C), of float or double; three rows, or four as above
  int rows;
  int64_t parts, parts_per_group, channels;
  void* stats;     // (5, C), from one group; or null:
  double* merged;  // (groups, 3, C)
  Parameter weight, bias;
  double eps;
};

// Stage two of other sums: (parts, width) to (groups, width).
struct AddPartsArgs {
  const void* partials;
  void* sums;
  int64_t parts, parts_per_group, width;
};

// Statistics that are given, and become `stats` as they are read.
struct FoldArgs {
  bool active;
  Parameter mean, var, weight, bias;
  double eps;
  void* stats;  // A (5, C) to be written, or null
  int64_t channels;
};

struct ApplyArgs {
  Cut cut;
  const void* x;
  void* y;
  const void *residual, *residual_stats;  // like x and A (5, C), or null
  const void* stats;                      // A (5, C); not read where `fold` is active
  FoldArgs fold;
  uint8_t* mask;  // relu_mask to be written, or null
  bool relu;
};

struct BackwardArgs {
  Cut cut;
  const void *dy, *x, *stats;
  const void *residual, *residual_stats;  // the other norm behind the same addition, or null
  const uint8_t* mask;                    // or null
  bool relu;                              // without a mask: masked by the sign of the normalised x
  void* partials;                         // A (parts, 2 or 3, C): sum dy, sum dy * xhat, that of the residual
  void* sums;                             // A (2 or 3, C)
  void *dx, *dresidual;                   // null where not wanted
  double count;                           // of values that the sums are over
  // Whether that norm's statistics are the batch's, and its input's gradient is wanted.
  bool training, residual_training;
  int sums_rows;  // 2, or 3 with a residual
};

struct AddMaskedArgs {
  Cut cut;
  void* into;
  const void* grad;
  const uint8_t* mask;  // or null
};

struct UpdateRunningArgs {
  static constexpr int kMost = 16;
  struct Norm {
    void *mean, *var;
    Dtype mean_dtype, var_dtype;
    const void* stats;
    bool is_double;
    int64_t channels;
    double momentum;
  };
  Norm norms[kMost];
};

void launch_partials(Dtype dtype, const PartialsArgs& args, Stream stream);
void launch_merge(bool double_partials, bool double_stats, const MergeArgs& args, Stream stream);
void launch_add_parts(bool is_double, const AddPartsArgs& args, Stream stream);
void launch_fold(bool double_stats, const FoldArgs& args, Stream stream);
void launch_apply(Dtype dtype, const ApplyArgs& args, Stream stream);
void launch_sums(Dtype dtype, const BackwardArgs& args, Stream stream);
void launch_dx(Dtype dtype, const BackwardArgs& args, Stream stream);
void launch_add_masked(Dtype dtype, const AddMaskedArgs& args, Stream stream);
// For so many norms, of up to so many channels.
void launch_update_running(const UpdateRunningArgs& args, int norms, int64_t channels, Stream stream);

}  // namespace fused_res::cuda
