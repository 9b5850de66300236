// Bug: no __syncwarp() between the shared-memory accesses of the lanes of a warp.
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::missing_syncwarp::VERSION {

struct Args {
  const int* in;
  int* out;
};

// Each lane reads the value that its neighbor has stored in shared memory. The ballot synchronizes the
// lanes, here and usually on a GPU, but does not order memory.
FUSED_RES_KERNEL(kWarpSize, 1) exchange_neighbors(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  const int own = args.in[threadIdx.x];
  shared[threadIdx.x] = own;
  const unsigned odd = __ballot_sync(~0u, own % 2);
#if !BROKEN
  __syncwarp();
#endif
  args.out[threadIdx.x] = shared[threadIdx.x ^ 1] + __popc(odd);
}

static const BugRegistrar registered("missing_syncwarp", kVersion, [] {
  std::vector<int> in(kWarpSize), out(kWarpSize), expected(kWarpSize);
  for (int i = 0; i < kWarpSize; ++i) {
    in[i] = i;
    expected[i] = (i ^ 1) + kWarpSize / 2;
  }
  launch(exchange_neighbors, dim3(1), kWarpSize, kWarpSize * sizeof(int), nullptr,
         Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::missing_syncwarp::VERSION
