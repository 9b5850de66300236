// Per-channel reductions over a block, for the statistics and the backward of batch norm: sum_rows for NHWC,
// PlaneSums for NCHW. Also the merge of the partial statistics of two chunks.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Vectors accumulated in float32 before the accumulators are added to sums in double.
constexpr int kFp32Terms = 32;
// Channels whose sums are on the stack.
constexpr int64_t kStackChannels = 2048;
// Prefetch distance in each operand, in bytes: the latency of memory in time, not a part of a cache.
constexpr int64_t kPrefetchBytes = 16384;
// Rows added per load and store of the accumulators.
constexpr int kRowUnroll = 4;
// One term of 1 + N sums: adds `value` to sum 0, and `value * weight[k]` to sum 1 + k.
template <class V, int N>
struct Term {
  V value, weight[N];
};

// NHWC: sums[k][c] over rows that are `stride` elements apart, for `width` <= kStackChannels channels.
// term(part, row, c) computes a vector of terms from the `operands`, which are prefetched.
//
// kRowUnroll rows are added per load and store of the accumulators. Memory is read in address order: only
// then does the L2 prefetcher keep up. Without it a core reads 4 to 5 GB/s here, against 12 to 20.
template <class V, int K, class F, class... T>
inline void sum_rows(int64_t rows, int64_t width, int64_t stride, double (&sums)[K][kStackChannels], F term,
                     const T*... operands) {
  using S = typename V::Scalar;
  alignas(64) S tile[K][kStackChannels];
  const int64_t padded = (width + V::lanes - 1) / V::lanes * V::lanes;
  const auto add = [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    for_each_vector<V>(width, [&](auto part, int64_t c) {
      V sum[K];
      for (int k = 0; k < K; ++k) sum[k] = load(tile[k] + c);
      for (int i = 0; i < kRows; ++i) {
        (prefetch(operands + (row + i) * stride + c + kPrefetchBytes / static_cast<int64_t>(sizeof(T))), ...);
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
    const int64_t end = min(row + kFp32Terms, rows);
    for (; row + kRowUnroll <= end; row += kRowUnroll) add(Int<kRowUnroll>{}, row);
    for (; row < end; ++row) add(Int<1>{}, row);
    for (int k = 0; k < K; ++k) {
      for (int64_t c = 0; c < padded; c += V::lanes) accumulate(sums[k] + c, load(tile[k] + c));
    }
  }
}

// NCHW: K sums of one channel over contiguous segments, with separate accumulators for each lane until
// reduce().
template <class V, int K>
class PlaneSums {
 public:
  template <class F>
  void add(int64_t n, F term) {  // term(part, offset)
    for_each_strip<V, kAccumulators>(n, [&](auto strip, int64_t i) {
      for (int way = 0; way < decltype(strip)::vectors; ++way) {
        const Term<V, K - 1> t = term(strip.part, i + way * V::lanes);
        tile_[0][way] = tile_[0][way] + t.value;
        for (int k = 1; k < K; ++k) tile_[k][way] = fma(t.value, t.weight[k - 1], tile_[k][way]);
      }
      if (++filled_ == kFp32Terms) flush();
    });
  }

  void reduce(double* sums, int64_t stride) {
    flush();
    for (int k = 0; k < K; ++k) {
      sums[k * stride] = 0.0;
      for (int i = 0; i < V::lanes; ++i) sums[k * stride] += sums_[k][i];
    }
  }

 private:
  static constexpr int kAccumulators = 4;  // independent accumulators per lane: an addition takes 4 cycles

  void flush() {
    for (int k = 0; k < K; ++k) {
      accumulate(sums_[k], (tile_[k][0] + tile_[k][1]) + (tile_[k][2] + tile_[k][3]));
      for (V& sum : tile_[k]) sum = V::zero();
    }
    filled_ = 0;
  }

  V tile_[K][kAccumulators] = {};
  double sums_[K][V::lanes] = {};
  int filled_ = 0;
};

// --- merge of the partial statistics of two chunks ---

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
