// Sums over a block, one for each channel, for batch_norm_act's statistics and its backward: a version for
// each layout. What chunks have summed is put together here, too.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Vectors summed in float32 before the sums go to double.
constexpr int kTile = 32;
// Channels whose sums live on the stack.
constexpr int64_t kSummedChannels = 2048;
// Bytes of each operand that are on their way to L2 before they are needed.
constexpr int64_t kAhead = 16384;
// Rows that are summed side by side.
constexpr int kRowsAtOnce = 4;
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class V, int N>
struct Term {  // adds `value` to the first sum, and `value * weight[k]` to the k-th behind it
  V value, weight[N];
};

// NHWC, for `width` <= kSummedChannels channels of rows that lie `stride` elements apart: sums[k][c] over the
// rows; term(part, row, c) reads the `operands`.
//
// A few rows go side by side, so that the sums are loaded and stored once for all of them. Memory is read in
// the order in which it lies: nothing else brings the L2's prefetcher along, and without it a core reads
// 4 to 5 GB/s here, against 12 to 20.
template <class V, int K, class F, class... T>
inline void sum_rows(int64_t rows, int64_t width, int64_t stride, double (&sums)[K][kSummedChannels], F term,
                     const T*... operands) {
  using S = typename V::Scalar;
  alignas(64) S tile[K][kSummedChannels];
  const int64_t padded = (width + V::lanes - 1) / V::lanes * V::lanes;
  const auto add = [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    for_each_vector<V>(width, [&](auto part, int64_t c) {
      V sum[K];
      for (int k = 0; k < K; ++k) sum[k] = load(tile[k] + c);
      for (int i = 0; i < kRows; ++i) {
        (prefetch(operands + (row + i) * stride + c + kAhead / static_cast<int64_t>(sizeof(T))), ...);
        const Term<V, K - 1> t = term(part, row + i, c);
        sum[0] = sum[0] + t.value;
        for (int k = 1; k < K; ++k) sum[k] = fma(t.value, t.weight[k - 1], sum[k]);
      }
      for (int k = 0; k < K; ++k) store(tile[k] + c, sum[k]);
    });
  };
  for (auto& sum : sums) {
    for (int64_t c = 0; c < padded; ++c) sum[c] = 0.0;
  }
  for (int64_t row = 0; row < rows;) {
    for (auto& sum : tile) {
      for (int64_t c = 0; c < padded; ++c) sum[c] = S(0);
    }
    const int64_t end = smaller(row + kTile, rows);
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) add(Count<kRowsAtOnce>{}, row);
    for (; row < end; ++row) add(Count<1>{}, row);
    for (int k = 0; k < K; ++k) {
      for (int64_t c = 0; c < padded; c += V::lanes) accumulate(sums[k] + c, load(tile[k] + c));
    }
  }
}

// NCHW, one channel: the same over runs of memory, each lane with K sums of its own until the end.
template <class V, int K>
class PlaneSums {
 public:
  template <class F>
  void add(int64_t n, F term) {  // term(part, offset)
    for_each_strip<V, kWays>(n, [&](auto strip, int64_t i) {
      for (int way = 0; way < decltype(strip)::vectors; ++way) {
        const Term<V, K - 1> t = term(strip.part, i + way * V::lanes);
        tile_[0][way] = tile_[0][way] + t.value;
        for (int k = 1; k < K; ++k) tile_[k][way] = fma(t.value, t.weight[k - 1], tile_[k][way]);
      }
      if (++filled_ == kTile) flush();
    });
  }

  void finish(double* sums, int64_t stride) {
    flush();
    for (int k = 0; k < K; ++k) {
      sums[k * stride] = 0.0;
      for (int i = 0; i < V::lanes; ++i) sums[k * stride] += sums_[k][i];
    }
  }

 private:
  static constexpr int kWays = 4;  // independent chains of additions, each 4 cycles long

  void flush() {
    for (int k = 0; k < K; ++k) {
      accumulate(sums_[k], (tile_[k][0] + tile_[k][1]) + (tile_[k][2] + tile_[k][3]));
      for (V& sum : tile_[k]) sum = V::zero();
    }
    filled_ = 0;
  }

  V tile_[K][kWays] = {};
  double sums_[K][V::lanes] = {};
  int filled_ = 0;
};

// --- of two chunks ---

inline void merge_partials(double* a, const double* b, double count_a, double count_b, int64_t channels,
                           int64_t c0, int64_t c1) {
  const MergeFactors factors = merge_factors(count_a, count_b);
  for (int64_t c = c0; c < c1; ++c) {
    const Moments m = merge({a[c], a[channels + c]}, {b[c], b[channels + c]}, factors);
    a[c] = m.mean;
    a[channels + c] = m.m2;
  }
}

inline void add_partials(double* a, const double* b, int64_t rows, int64_t channels, int64_t c0, int64_t c1) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = row * channels + c0; c < row * channels + c1; ++c) a[c] += b[c];
  }
}

}  // namespace
}  // namespace fused_res::cpu
