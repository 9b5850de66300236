// Bug: the last iteration of a two-stage pipeline waits for all but the last cp.async group, which is the one
// it needs.
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::wrong_wait_group::VERSION {

constexpr int kThreads = 32, kTiles = 5;

struct Args {
  const int4* in;
  int* out;
};

// Adds up tiles that are prefetched one iteration ahead. No copy follows the last tile, so "all but the last
// group" would exclude its own.
FUSED_RES_KERNEL(kThreads, 1) add_tiles(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int4*>(shared_memory());
  const auto copy = [&](int tile) {
    ptx::cp_async(shared_address(shared + tile % 2 * kThreads + threadIdx.x),
                  args.in + tile * kThreads + threadIdx.x, true);
    ptx::cp_async_commit_group();
  };
  copy(0);
  int sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) copy(tile + 1);
#if !BROKEN
    if (tile + 1 == kTiles)
      ptx::cp_async_wait_group<0>();
    else
#endif
      ptx::cp_async_wait_group<1>();
    __syncthreads();
    sum += shared[tile % 2 * kThreads + kThreads - 1 - threadIdx.x].x;
    __syncthreads();
  }
  args.out[threadIdx.x] = sum;
}

static const BugRegistrar registered("wrong_wait_group", kVersion, [] {
  std::vector<int4> in(kThreads * kTiles);
  std::vector<int> out(kThreads), expected(kThreads);
  for (int i = 0; i < kThreads * kTiles; ++i) {
    in[i].x = i * i;
    expected[kThreads - 1 - i % kThreads] += i * i;
  }
  launch(add_tiles, dim3(1), kThreads, 2 * kThreads * sizeof(int4), nullptr, Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::wrong_wait_group::VERSION
