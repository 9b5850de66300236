#include <vector>

#include "../bug.h"

namespace fused_res::cuda::wrong_wait_group::VERSION {

constexpr int kThreads = 32, kTiles = 5;

struct Args {
  const int4* in;
  int* out;
};

// Adds up tiles that are copied one ahead of their use. The last tile has none behind it, so that "all but
// the last group" would be all but itself.
FUSED_RES_KERNEL(kThreads, 1) add_tiles(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int4*>(shared_memory());
  const auto copy = [&](int tile) {
    ptx::copy_async(shared_address(shared + tile % 2 * kThreads + threadIdx.x),
                    args.in + tile * kThreads + threadIdx.x, true);
    ptx::copy_async_commit();
  };
  copy(0);
  int sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) copy(tile + 1);
#if !BROKEN
    if (tile + 1 == kTiles)
      ptx::copy_async_wait<0>();
    else
#endif
      ptx::copy_async_wait<1>();
    __syncthreads();
    sum += shared[tile % 2 * kThreads + kThreads - 1 - threadIdx.x].x;
    __syncthreads();
  }
  args.out[threadIdx.x] = sum;
}

static const Register registered("wrong_wait_group", kVersion, [] {
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
