// Bug: no __syncthreads() between writing and reading shared memory.
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::missing_syncthreads::VERSION {

constexpr int kThreads = 96;

struct Args {
  const int* in;
  int* out;
};

// Reverses the values of the block.
FUSED_RES_KERNEL(kThreads, 1) reverse_block(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = args.in[threadIdx.x];
#if !BROKEN
  __syncthreads();
#endif
  args.out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

static const BugRegistrar registered("missing_syncthreads", kVersion, [] {
  std::vector<int> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  launch(reverse_block, dim3(1), kThreads, kThreads * sizeof(int), nullptr, Args{in.data(), out.data()});
  return out == std::vector<int>(in.rbegin(), in.rend());
});

}  // namespace fused_res::cuda::missing_syncthreads::VERSION
