// Launches of the kernels of single_pass.cuh, and the heuristic that selects them.
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "cuda/dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/single_pass.cuh"

namespace fused_res::cuda {
namespace {

// The values of FUSED_RES_SINGLE_PASS (fused_res/env.py): auto, 0 and 1. Python rejects other values.
enum Mode { kAuto = -1, kNever, kForced };

std::atomic<int> mode = [] {
  const char* variable = std::getenv("FUSED_RES_SINGLE_PASS");
  const std::string_view value = variable == nullptr ? "" : variable;
  return value == "auto" ? kAuto : value == "1" ? kForced : kNever;
}();

// Whether the single pass is estimated to be faster. Forward, bytes moved through HBM for an activation of X
// bytes in P parts and C channels:
//                      two passes                        single pass
//   x read             1 X, and 1 X more beyond the L2   1 X
//   y written          1 X                               1 X
//   through the L2     1 X                               -
//   partials, 16 P C   written, read once                written, read by all blocks of the channel: 16 P^2 C
//   launches           3                                 1, and 4 bytes cleared
// Backward: dy and x in place of x, and 8 P C, 8 P^2 C for the partials. The single pass saves launches and
// reads from the L2, and costs a barrier and the parts of a channel block, which every threadblock reads. It
// pays where launches dominate the time: for activations that fit on chip at once and have few parts. Not
// measured yet.
bool is_single_pass_profitable(const WorkPartition& partition) {
  constexpr int64_t kMaxMergedBytes = 64 << 10;
  return partition.parts * partition.block_channels * 16 <= kMaxMergedBytes;
}

// Return the configuration with the largest slices that fit on chip, and for them the fewest work units per
// threadblock: more threadblocks hide more latency.
template <class Arguments>
std::optional<SinglePassConfig> fit(void (*kernel)(Arguments), const WorkPartition& partition, size_t scratch,
                                    size_t unit_bytes) {
  for (int64_t blocks = partition.channel_blocks;; blocks = ceil_div(blocks, 2)) {
    for (int64_t units_per_block = 1;; ++units_per_block) {
      const size_t shared = scratch + static_cast<size_t>(units_per_block) * unit_bytes;
      const int64_t grid = ceil_div(blocks * partition.parts, units_per_block);
      const int64_t resident = resident_blocks(kernel, kThreads, shared);
      if (grid <= resident) return SinglePassConfig{blocks, units_per_block, grid, shared};
      if (resident == 0) break;
    }
    if (blocks == 1) return std::nullopt;
  }
}

template <class Arguments>
std::optional<SinglePassConfig> choose(void (*kernel)(Arguments), const WorkPartition& partition,
                                       size_t scratch, size_t element_bytes) {
  if (mode == kNever || (mode == kAuto && !is_single_pass_profitable(partition))) return std::nullopt;
  const size_t unit_bytes =
      partition.tiles_per_part * kStepsPerTile * kThreads * partition.vector_size * element_bytes;
  const std::optional<SinglePassConfig> config = fit(kernel, partition, scratch, unit_bytes);
  return config && (mode == kForced || config->blocks_per_slice == partition.channel_blocks) ? config
                                                                                             : std::nullopt;
}

}  // namespace

std::optional<SinglePassConfig> choose_single_pass_forward(Dtype dtype, const WorkPartition& partition) {
  std::optional<SinglePassConfig> config;
  dispatch_layout(dtype, partition, [&]<class T, Layout layout, int n>() {
    config = choose(single_pass_forward_kernel<T, layout, n>, partition, kSinglePassScratch<Accumulator<T>>,
                    sizeof(T));
  });
  return config;
}

std::optional<SinglePassConfig> choose_single_pass_backward(Dtype dtype, const WorkPartition& partition) {
  std::optional<SinglePassConfig> config;
  dispatch_layout(dtype, partition, [&]<class T, Layout layout, int n>() {
    config = choose(single_pass_backward_kernel<T, layout, n>, partition, kSinglePassScratch<Accumulator<T>>,
                    2 * sizeof(T));
  });
  return config;
}

void launch_single_pass_forward(Dtype dtype, const SinglePassForwardArgs& args, Stream stream) {
  const dim3 grid = checked_grid(args.config.grid);
  fill_zero(args.counter, sizeof(unsigned), stream);
  dispatch_layout(dtype, args.apply.partition, [&]<class T, Layout layout, int n>() {
    launch_cooperative(single_pass_forward_kernel<T, layout, n>, grid, kThreads, args.config.shared, stream,
                       args);
  });
}

void launch_single_pass_backward(Dtype dtype, const SinglePassBackwardArgs& args, Stream stream) {
  const dim3 grid = checked_grid(args.config.grid);
  fill_zero(args.counter, sizeof(unsigned), stream);
  dispatch_layout(dtype, args.backward.partition, [&]<class T, Layout layout, int n>() {
    launch_cooperative(single_pass_backward_kernel<T, layout, n>, grid, kThreads, args.config.shared, stream,
                       args);
  });
}

}  // namespace fused_res::cuda

// For tests: set the mode that FUSED_RES_SINGLE_PASS has set when the library was loaded, -1 for auto, and
// return the previous one.
extern "C" __attribute__((visibility("default"))) int fused_res_cuda_single_pass(int mode) {
  return fused_res::cuda::mode.exchange(mode);
}
