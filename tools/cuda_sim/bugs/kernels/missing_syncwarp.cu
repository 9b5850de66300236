#include <vector>

#include "../bug.h"

namespace fused_res::cuda::missing_syncwarp::VERSION {

struct Args {
  const int* in;
  int* out;
};

// Each lane takes what its neighbour left in shared memory. The ballot makes lanes wait for each other, here
// and most often on a GPU, but orders no memory.
FUSED_RES_KERNEL(kWarp, 1) take_neighbours(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  const int own = args.in[threadIdx.x];
  shared[threadIdx.x] = own;
  const unsigned odd = __ballot_sync(~0u, own % 2);
#if !BROKEN
  __syncwarp();
#endif
  args.out[threadIdx.x] = shared[threadIdx.x ^ 1] + __popc(odd);
}

static const Register registered("missing_syncwarp", kVersion, [] {
  std::vector<int> in(kWarp), out(kWarp), expected(kWarp);
  for (int i = 0; i < kWarp; ++i) {
    in[i] = i;
    expected[i] = (i ^ 1) + kWarp / 2;
  }
  launch(take_neighbours, dim3(1), kWarp, kWarp * sizeof(int), nullptr, Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::missing_syncwarp::VERSION
