// Launches of single_pass.cuh, and when they take place.
#include <atomic>

#include "cuda/dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/single_pass.cuh"

namespace fused_res::cuda {
namespace {

enum Mode { kByRule = -1, kNever, kWhereverPossible };
std::atomic<int> mode = kByRule;

// Forward, bytes that pass through HBM, of an activation of X bytes in P parts and C channels:
//                      two passes                        single pass
//   x read             1 X, and 1 X more past the L2     1 X
//   y written          1 X                               1 X
//   through the L2     1 X                               -
//   partials, 16 P C   written, read once                written, read by all blocks of the channel: 16 P^2 C
//   launches           3                                 1, and 4 bytes cleared
// (Backward: dy and x for x, and 8 P C, 8 P^2 C.) So what is saved is launches, and reads from the L2; what
// is paid is a barrier and the parts of a block of channels, which every thread block reads. Worth it where
// launches are most of the time: for what fits on chip whole, and has few parts. Not measured yet.
bool prefers_single_pass(const Cut& cut) {
  constexpr int64_t kMergedBytes = 64 << 10;
  return cut.parts * cut.block_channels * 16 <= kMergedBytes;
}

// The largest slices that fit on chip, and for them the fewest units a block: more blocks hide more latency.
template <class Arguments>
std::optional<SinglePassWork> fit(void (*kernel)(Arguments), const Cut& cut, size_t scratch,
                                  size_t unit_bytes) {
  for (int64_t blocks = cut.blocks;; blocks = ceil_div(blocks, 2)) {
    for (int64_t units_per_block = 1;; ++units_per_block) {
      const size_t shared = scratch + static_cast<size_t>(units_per_block) * unit_bytes;
      const int64_t grid = ceil_div(blocks * cut.parts, units_per_block);
      const int64_t resident = resident_blocks(kernel, kThreads, shared);
      if (grid <= resident) return SinglePassWork{blocks, units_per_block, grid, shared};
      if (resident == 0) break;
    }
    if (blocks == 1) return std::nullopt;
  }
}

template <class Arguments>
std::optional<SinglePassWork> choose(void (*kernel)(Arguments), const Cut& cut, size_t scratch,
                                     size_t element_bytes) {
  if (mode == kNever || (mode == kByRule && !prefers_single_pass(cut))) return std::nullopt;
  const size_t unit_bytes = cut.tiles_per_part * kTile * kThreads * cut.vector * element_bytes;
  const std::optional<SinglePassWork> work = fit(kernel, cut, scratch, unit_bytes);
  return work && (mode == kWhereverPossible || work->blocks_per_slice == cut.blocks) ? work : std::nullopt;
}

}  // namespace

std::optional<SinglePassWork> choose_single_pass_forward(Dtype dtype, const Cut& cut) {
  std::optional<SinglePassWork> work;
  with_walk(dtype, cut, [&]<class T, Layout layout, int n>() {
    work =
        choose(single_pass_forward_kernel<T, layout, n>, cut, kSinglePassScratch<Accumulator<T>>, sizeof(T));
  });
  return work;
}

std::optional<SinglePassWork> choose_single_pass_backward(Dtype dtype, const Cut& cut) {
  std::optional<SinglePassWork> work;
  with_walk(dtype, cut, [&]<class T, Layout layout, int n>() {
    work = choose(single_pass_backward_kernel<T, layout, n>, cut, kSinglePassScratch<Accumulator<T>>,
                  2 * sizeof(T));
  });
  return work;
}

void launch_single_pass_forward(Dtype dtype, const SinglePassForwardArgs& args, Stream stream) {
  fill_zero(args.counter, sizeof(unsigned), stream);
  with_walk(dtype, args.apply.cut, [&]<class T, Layout layout, int n>() {
    launch_cooperative(single_pass_forward_kernel<T, layout, n>, dim3(static_cast<unsigned>(args.work.grid)),
                       kThreads, args.work.shared, stream, args);
  });
}

void launch_single_pass_backward(Dtype dtype, const SinglePassBackwardArgs& args, Stream stream) {
  fill_zero(args.counter, sizeof(unsigned), stream);
  with_walk(dtype, args.backward.cut, [&]<class T, Layout layout, int n>() {
    launch_cooperative(single_pass_backward_kernel<T, layout, n>, dim3(static_cast<unsigned>(args.work.grid)),
                       kThreads, args.work.shared, stream, args);
  });
}

}  // namespace fused_res::cuda

// For tests and tuning: -1 by the rule above, 0 never, 1 wherever it is possible.
extern "C" __attribute__((visibility("default"))) void fused_res_cuda_single_pass(int mode) {
  fused_res::cuda::mode = mode;
}
