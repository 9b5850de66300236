// Single-pass batch norm + residual + activation for training, one cooperative kernel each for forward and
// backward, for activations that fit on chip: x is read from HBM into shared memory once, and applied from
// there after a grid barrier. The parts and the order of their merge are those of the multi-pass kernels, so
// the results are bitwise equal.
#pragma once

#include <optional>

#include "cuda/batch_norm_act.h"

namespace fused_res::cuda {

// Launch configuration: the channel blocks are processed in slices of blocks_per_slice, and of each slice a
// threadblock keeps units_per_block work units in shared memory. It does not affect the result.
struct SinglePassConfig {
  int64_t blocks_per_slice, units_per_block;
  int64_t grid;
  size_t shared;
};

struct SinglePassForwardArgs {
  ApplyArgs apply;
  MergeArgs merge;  // output and parameters of the merge; its `partials` is unused
  void* partials;   // scratch, A (parts, 4, C)
  SinglePassConfig config;
  unsigned* counter;  // counter of ptx::grid_barrier; the launch clears it
};

struct SinglePassBackwardArgs {
  BackwardArgs backward;  // its `sums` is unused
  ParameterGrads grads;   // outputs
  SinglePassConfig config;
  unsigned* counter;
};

// Return the launch configuration on the current device for an activation partitioned for a reduction (at
// most kMaxReductionUnits work units), or nullopt if not even one channel block fits on chip, or if
// FUSED_RES_SINGLE_PASS selects the multi-pass kernels, which is the default.
std::optional<SinglePassConfig> choose_single_pass_forward(Dtype dtype, const WorkPartition& partition);
std::optional<SinglePassConfig> choose_single_pass_backward(Dtype dtype, const WorkPartition& partition);

void launch_single_pass_forward(Dtype dtype, const SinglePassForwardArgs& args, Stream stream);
void launch_single_pass_backward(Dtype dtype, const SinglePassBackwardArgs& args, Stream stream);

}  // namespace fused_res::cuda
