// Winograd convolution F(2x2, 3x3) with stride 1 whose transform-domain GEMMs have bfloat16 operands and fp32
// accumulators (the algorithm `winograd_f2x2_bf16`). The transforms are those of winograd.h, in fp32; V and U
// are rounded to bfloat16. Larger tiles would amplify that rounding beyond the error of a direct bfloat16
// convolution.
#pragma once

#include "cpu/isa/dot_micro_kernel.h"
#include "cpu/isa/winograd.h"

namespace fused_res::cpu {
namespace {

// Stores accumulators to rows of M.
class StoreRows {
 public:
  StoreRows() = default;
  explicit StoreRows(float* m) : m_(m) {}
  void store(Vec<float> low, Vec<float> high) {
    cpu::store(m_, low), cpu::store(m_ + kHalfWidth, high);
    m_ += kPanelWidth;
  }

 private:
  float* m_ = nullptr;
};

// The channels must be a multiple of kBlockK.
class WinogradGemmBf16 {
 public:
  using Operand = bfloat16;
  // One cache line more than the channels, so that rows do not alias in one set of the L1.
  static int64_t v_stride(int64_t channels) { return channels + kBlockK; }
  static int64_t point_size(int64_t channels) { return channels * kPanelWidth; }
  // F(2x2) uses the points 0, +a, -a and infinity of each dimension.
  static constexpr int kStoredPoints = 16;
  static int position(int i, int j) {
    const auto in_dimension = [](int p) { return p < 3 ? p : p == kInfinity ? 3 : -1; };
    const int y = in_dimension(i), x = in_dimension(j);
    return y < 0 || x < 0 ? -1 : y * 4 + x;
  }
  static void store_filters(bfloat16* u, int64_t channel, const float* values, bool) {
    bfloat16 rounded[kPanelWidth];
    store(rounded, load(values)), store(rounded + kHalfWidth, load(values + kHalfWidth));
    for (int o = 0; o < kPanelWidth; ++o) u[vnni_offset(channel, o)] = rounded[o];
  }
  void run(int64_t rows, const bfloat16* v, const bfloat16* u, int64_t channels, float* m) {
    const TapLoop blocks = {1, 1, channels / kBlockK, 0, 0};
    const int64_t stride = v_stride(channels), count = (rows + Kernel::kRows - 1) / Kernel::kRows;
    PrefetchStreams none;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
      kernel_.run(end - begin, v + begin * stride, stride, u, blocks, none,
                  StoreRows(m + begin * kPanelWidth));
    }
    kernel_.finish();
  }

 private:
  using Kernel = DotMicroKernel<StoreRows>;
  Kernel kernel_;
};

}  // namespace
}  // namespace fused_res::cpu
