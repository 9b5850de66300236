// Bug: blocks update a value in global memory without an atomic operation.
#include "../bug.h"

namespace fused_res::cuda::race_between_blocks::VERSION {

constexpr int kBlocks = 3;

struct Args {
  unsigned* sum;
};

// One thread per block adds its block index. The simulator runs blocks one after another, a GPU concurrently.
FUSED_RES_KERNEL(1, 1) add(const __grid_constant__ Args args) {
#if BROKEN
  *args.sum += blockIdx.x;
#else
  atomicAdd(args.sum, blockIdx.x);
#endif
}

static const BugRegistrar registered("race_between_blocks", kVersion, [] {
  unsigned sum = 0;
  launch(add, dim3(kBlocks), 1, 0, nullptr, Args{&sum});
  return sum == 0 + 1 + 2;
});

}  // namespace fused_res::cuda::race_between_blocks::VERSION
