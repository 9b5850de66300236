// Bug: the last thread's vector load reads beyond the end of an array in global memory.
#include <cstdlib>
#include <memory>

#include "../bug.h"

namespace fused_res::cuda::out_of_bounds_global::VERSION {

constexpr int kThreads = 32, kCount = 4 * kThreads - 2;

struct Args {
  const int* in;
  int* out;
};

// Doubles values, four per thread; the last thread has two.
FUSED_RES_KERNEL(kThreads, 1) double_values(const __grid_constant__ Args args) {
  const int first = 4 * threadIdx.x;
#if !BROKEN
  if (first + 4 > kCount) {
    for (int i = first; i < kCount; ++i) args.out[i] = 2 * args.in[i];
    return;
  }
#endif
  const int4 four = *reinterpret_cast<const int4*>(args.in + first);
  const int doubled[] = {2 * four.x, 2 * four.y, 2 * four.z, 2 * four.w};
  for (int i = 0; i < 4 && first + i < kCount; ++i) args.out[first + i] = doubled[i];
}

static const BugRegistrar registered("out_of_bounds_global", kVersion, [] {
  const std::unique_ptr<int, void (*)(void*)> in(static_cast<int*>(std::malloc(kCount * sizeof(int))),
                                                 std::free);
  int out[kCount];
  for (int i = 0; i < kCount; ++i) in.get()[i] = i;
  launch(double_values, dim3(1), kThreads, 0, nullptr, Args{in.get(), out});
  bool right = true;
  for (int i = 0; i < kCount; ++i) right &= out[i] == 2 * i;
  return right;
});

}  // namespace fused_res::cuda::out_of_bounds_global::VERSION
