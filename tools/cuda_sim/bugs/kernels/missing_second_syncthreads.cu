#include <vector>

#include "../bug.h"

namespace fused_res::cuda::missing_second_syncthreads::VERSION {

constexpr int kThreads = 64, kTiles = 3;

struct Args {
  const int* in;
  int* out;
};

// Turns tile after tile round, all in the same buffer, which may be written to again only when all have read.
FUSED_RES_KERNEL(kThreads, 1) turn_tiles(const __grid_constant__ Args args) {
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

static const Register registered("missing_second_syncthreads", kVersion, [] {
  std::vector<int> in(kThreads * kTiles), out(in.size()), expected(in.size());
  for (int i = 0; i < kThreads * kTiles; ++i) {
    in[i] = i;
    expected[i] = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  }
  launch(turn_tiles, dim3(1), kThreads, kThreads * sizeof(int), nullptr, Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::missing_second_syncthreads::VERSION
