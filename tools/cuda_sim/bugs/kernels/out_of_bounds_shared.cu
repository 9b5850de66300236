// Bug: the last thread reads beyond the end of shared memory.
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::out_of_bounds_shared::VERSION {

constexpr int kThreads = 40;

struct Args {
  const int* in;
  int* out;
};

// Differences of adjacent values; 0 for the last one.
FUSED_RES_KERNEL(kThreads, 1) differences(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<volatile int*>(shared_memory());
  const int thread = threadIdx.x;
  shared[thread] = args.in[thread];
  __syncthreads();
#if BROKEN
  const int next = shared[thread + 1];
#else
  const int next = thread + 1 < kThreads ? shared[thread + 1] : 0;
#endif
  args.out[thread] = thread + 1 < kThreads ? next - shared[thread] : 0;
}

static const BugRegistrar registered("out_of_bounds_shared", kVersion, [] {
  std::vector<int> in(kThreads), out(kThreads), expected(kThreads, 3);
  for (int i = 0; i < kThreads; ++i) in[i] = 3 * i;
  expected.back() = 0;
  launch(differences, dim3(1), kThreads, kThreads * sizeof(int), nullptr, Args{in.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::out_of_bounds_shared::VERSION
