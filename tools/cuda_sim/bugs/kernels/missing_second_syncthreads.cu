// Bug: no __syncthreads() between the reads of a shared buffer and the writes of the next iteration.
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::missing_second_syncthreads::VERSION {

constexpr int kThreads = 64, kTiles = 3;

struct Args {
  const int* in;
  int* out;
};

// Reverses each tile in the same shared buffer, which may be overwritten only after all threads have read it.
FUSED_RES_KERNEL(kThreads, 1) reverse_tiles(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  for (int tile = 0; tile < kTiles; ++tile) {
    const int at = tile * kThreads + threadIdx.x;
    shared[threadIdx.x] = args.in[at];
    __syncthreads();
    args.out[at] = shared[kThreads - 1 - threadIdx.x];
#if !BROKEN
    __syncthreads();
#endif
  }
}

static const BugRegistrar registered("missing_second_syncthreads", kVersion, [] {
  std::vector<int> in(kThreads * kTiles), out(in.size()), expected(in.size());
  for (int i = 0; i < kThreads * kTiles; ++i) {
    in[i] = i;
    expected[i] = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  }
  launch(reverse_tiles, dim3(1), kThreads, kThreads * sizeof(int), nullptr, Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::missing_second_syncthreads::VERSION
