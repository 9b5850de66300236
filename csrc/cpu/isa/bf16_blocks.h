// Blocks of bfloat16 pairs in registers: transposition, interleaving and rounding.
#pragma once

#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// A vector of each of the 16 columns of 32-bit elements of these 16 rows.
inline void transpose_16x16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 * i + j]: column 4 * k + j of rows 4 * i to 4 * i + 3, in its 128-bit lane k.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88),
                  high = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd),
                  low2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88),
                  high2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Interleaves the elements of two rows of bfloat16: those of the columns [0, 16) and of [16, 32).
class PairInterleaver {
 public:
  PairInterleaver() {
    alignas(64) int16_t order[2][32];
    for (int i = 0; i < 16; ++i) {
      for (int half = 0; half < 2; ++half) {
        order[half][2 * i] = static_cast<int16_t>(16 * half + i);
        order[half][2 * i + 1] = static_cast<int16_t>(16 * half + i + 32);
      }
    }
    low_ = _mm512_load_si512(order[0]), high_ = _mm512_load_si512(order[1]);
  }
  __m512i low_columns(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, low_, odd); }
  __m512i high_columns(__m512i even, __m512i odd) const {
    return _mm512_permutex2var_epi16(even, high_, odd);
  }

 private:
  __m512i low_, high_;
};

// Rounds two vectors to bfloat16.
inline __m512i narrow_pair(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low, bfloat16{})), narrow(high, bfloat16{}), 1);
#endif
}

}  // namespace
}  // namespace fused_res::cpu
