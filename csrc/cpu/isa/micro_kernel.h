// Register-blocked GEMM micro-kernels (Goto & van de Geijn 2008; BLIS), which all convolutions use: an mr x
// nr block of C = A B is accumulated in registers from mr rows of A and a packed panel of B, kPanelWidth
// columns wide. An accumulator runs over all of K in order, so an output element is bitwise independent of
// the register block that computes it.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// nr: two vectors of columns, which are the whole panel with AVX-512 and half of it with AVX2.
constexpr int kNrVectors = 2;
constexpr int kNr = kNrVectors * Vec<float>::lanes;
static_assert(kPanelWidth % kNr == 0);

// mr. Registers: kMr * kNrVectors accumulators, kNrVectors vectors of B and one broadcast element of A.
#if defined(__AVX512F__)
constexpr int kMr = 14;  // of 32
#else
constexpr int kMr = 6;  // of 16
#endif

// Prefetch distance in B, in floats. The hardware prefetcher stops at page boundaries: a weight of megabytes
// that is read once for a few rows (one image, 256 channels of 14x14) is read from memory 1.3x as fast with
// software prefetch. The distance, 8 KB, is the latency of memory in time, 64 iterations of kMr * kNrVectors
// FMAs; in size it is a quarter of an L1 of 32 KB and a sixth of one of 48 KB.
constexpr int64_t kPrefetchDistance = 64 * kPanelWidth, kLine = 16;

// Calls f(Int<rows>{}) for a run-time row count of 1 to kMr.
template <int R = kMr, class F>
inline void dispatch_mr(int64_t rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return dispatch_mr<R - 1>(rows, f);
  }
  f(Int<R>{});
}

// acc[r] = a[r][0..k) * b[0..k)[0..kNr). The accumulators stay in registers if the caller unrolls its loops
// over them as well. Rows of A are `lda` apart, those of B kPanelWidth. `ahead`: if not 0, the elements so
// far after those of A are prefetched.
template <int R>
[[gnu::always_inline]] inline void micro_kernel(const float* a, int64_t lda, const float* b, int64_t k,
                                                Vec<float> (&acc)[R][kNrVectors], int64_t ahead = 0) {
  using V = Vec<float>;
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) acc[r][v] = V::zero();
  }
  // One pointer for three rows: x86 addressing modes add once or twice a register's value, and 14 pointers
  // would not fit into the general-purpose registers.
  constexpr int kPointers = (R + 2) / 3;
  const float* pointers[kPointers];
  for (int i = 0; i < kPointers; ++i) pointers[i] = a + 3 * i * lda;
  for (int64_t p = 0; p < k; ++p) {
    V b_row[kNrVectors];
    if (ahead != 0 && p % kLine == 0) {
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) prefetch(pointers[r / 3] + r % 3 * lda + ahead);
    }
    prefetch(b + kPrefetchDistance);
    prefetch(b + kPrefetchDistance + kLine);
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) b_row[v] = load(b + v * V::lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const V a_element = V::broadcast(pointers[r / 3][r % 3 * lda]);
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v) acc[r][v] = fma(a_element, b_row[v], acc[r][v]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < kPointers; ++i) ++pointers[i];
    b += kPanelWidth;
  }
}

// The same, with the accumulators stored to C, whose rows are kPanelWidth apart.
template <int R>
inline void micro_kernel_store(const float* a, int64_t lda, const float* b, int64_t k, float* c,
                               int64_t ahead) {
  using V = Vec<float>;
  V acc[R][kNrVectors];
  micro_kernel<R>(a, lda, b, k, acc, ahead);
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) store(c + r * kPanelWidth + v * V::lanes, acc[r][v]);
  }
}
// The same for a run-time number of rows, 1 to kMr. Not inlined: its kernels are the same for every dtype.
[[gnu::noinline]] void micro_gemm(int64_t rows, const float* a, int64_t lda, const float* b, int64_t k,
                                  float* c, int64_t ahead = 0) {
  dispatch_mr(rows, [&](auto count) { micro_kernel_store<count.value>(a, lda, b, k, c, ahead); });
}

// C (+)= A^T B: c[r][0..kNr) = or, unless `overwrite`, += a[0..k)[r] * b[0..k)[0..kNr). The elements of A
// that one step reads are contiguous. The k terms are accumulated from zero and then added to C, which keeps
// the rounding error small. `step()` runs every kTnSteps terms.
constexpr int64_t kTnSteps = 8;
template <int R, class Step>
inline void micro_kernel_tn(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
                            bool overwrite, float* c, const Step& step) {
  using V = Vec<float>;
  V acc[R][kNrVectors];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) acc[r][v] = V::zero();
  }
  // C is in L2: its lines arrive while the terms are accumulated.
  for (int r = 0; r < R && !overwrite; ++r) {
    for (int64_t line = 0; line < kNr; line += kLine) prefetch_to_write(c + r * kPanelWidth + line);
  }
  for (int64_t p = 0; p < k;) {
    const int64_t end = p + kTnSteps < k ? p + kTnSteps : k;
    step();
    for (; p < end; ++p) {
      V b_row[kNrVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v) b_row[v] = load(b + v * V::lanes);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const V a_element = V::broadcast(a[r]);
#pragma GCC unroll 2
        for (int v = 0; v < kNrVectors; ++v) acc[r][v] = fma(a_element, b_row[v], acc[r][v]);
      }
      a += lda;
      b += ldb;
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) {
      float* element = c + r * kPanelWidth + v * V::lanes;
      store(element, overwrite ? acc[r][v] : load(element) + acc[r][v]);
    }
  }
}

// The same for a run-time number of rows, 1 to kMr.
template <class Step>
inline void micro_gemm_tn(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
                          bool overwrite, float* c, const Step& step) {
  dispatch_mr(rows, [&](auto count) { micro_kernel_tn<count.value>(a, lda, b, ldb, k, overwrite, c, step); });
}

// Calls f(first row, rows) for register blocks of nearly equal height. A remainder block of one or two rows
// would have too few accumulators to hide the latency of an FMA.
template <class F>
inline void for_each_row_block(int64_t rows, F f) {
  const int64_t blocks = (rows + kMr - 1) / kMr;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = rows * block / blocks;
    f(begin, rows * (block + 1) / blocks - begin);
  }
}

}  // namespace
}  // namespace fused_res::cpu
