// Bug: two registers of the A fragment of an mma are swapped.
#include <utility>
#include <vector>

#include "../bug.h"

namespace fused_res::cuda::swapped_fragments::VERSION {

constexpr int kRows = 16, kDepth = 16, kColumns = 8;

struct Args {
  const __half* a;  // row-major
  const __half* b;  // column-major
  float* out;
};

FUSED_RES_KERNEL(kWarpSize, 1) product(const __grid_constant__ Args args) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  const auto two_of = [&](const __half* matrix, int row, int half) {
    return *reinterpret_cast<const uint32_t*>(matrix + row * kDepth + 2 * pair + 8 * half);
  };
  uint32_t a[4] = {two_of(args.a, group, 0), two_of(args.a, group + 8, 0), two_of(args.a, group, 1),
                   two_of(args.a, group + 8, 1)};
  const uint32_t b[2] = {two_of(args.b, group, 0), two_of(args.b, group, 1)};
#if BROKEN
  const uint32_t first = a[1];
  a[1] = a[2];
  a[2] = first;
#endif
  float sums[4] = {};
  ptx::mma_sync<__half>(sums, a, b);
  for (int i = 0; i < 4; ++i) args.out[(group + i / 2 * 8) * kColumns + 2 * pair + i % 2] = sums[i];
}

static const BugRegistrar registered("swapped_fragments", kVersion, [] {
  std::vector<__half> a(kRows * kDepth), b(kColumns * kDepth);
  std::vector<float> out(kRows * kColumns), expected(out.size());
  const auto fill = [](std::vector<__half>& matrix, int step) {
    for (size_t i = 0; i < matrix.size(); ++i)
      matrix[i] = __int2half_rn(static_cast<int>(i) * step % 31 - 15);
  };
  fill(a, 7);
  fill(b, 11);
  for (int i = 0; i < kRows * kColumns; ++i) {
    for (int k = 0; k < kDepth; ++k)
      expected[i] += __half2float(a[i / kColumns * kDepth + k]) * __half2float(b[i % kColumns * kDepth + k]);
  }
  launch(product, dim3(1), kWarpSize, 0, nullptr, Args{a.data(), b.data(), out.data()});
  return out == expected;
});

}  // namespace fused_res::cuda::swapped_fragments::VERSION
