// batch_norm_act in training as one cooperative kernel, forward and backward, for what fits on chip: x goes
// from HBM to shared memory once, and is applied from there when all blocks have met. The parts and the order
// of their merge are those of two passes, and so are the bits.
#pragma once

#include <optional>

#include "cuda/batch_norm_act.h"

namespace fused_res::cuda {

// Who works on what: the channels are taken in slices of so many blocks, and of each slice a thread block
// holds so many units in shared memory. Nothing here changes a result.
struct SinglePassWork {
  int64_t blocks_per_slice, units_per_block;
  int64_t grid;
  size_t shared;
};

struct SinglePassForwardArgs {
  ApplyArgs apply;
  MergeArgs merge;  // what becomes of the partials; which and how many they are is known here
  void* partials;   // to be written, and read
  SinglePassWork work;
  unsigned* counter;  // of ptx::grid_barrier; cleared by the launch
};

struct SinglePassBackwardArgs {
  BackwardArgs backward;
  SinglePassWork work;
  unsigned* counter;
};

// For an activation that is cut for a reduction, on the current device; nothing where not even one block of
// channels fits, or where two passes are thought to be faster.
std::optional<SinglePassWork> choose_single_pass_forward(Dtype dtype, const Cut& cut);
std::optional<SinglePassWork> choose_single_pass_backward(Dtype dtype, const Cut& cut);

void launch_single_pass_forward(Dtype dtype, const SinglePassForwardArgs& args, Stream stream);
void launch_single_pass_backward(Dtype dtype, const SinglePassBackwardArgs& args, Stream stream);

}  // namespace fused_res::cuda
