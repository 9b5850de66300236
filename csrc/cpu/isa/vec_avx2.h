// Vec for AVX2 with FMA and F16C; vec.h defines the operations. A Vec<double> is a pair of registers.
#pragma once

#include <immintrin.h>

namespace fused_res::cpu {
namespace {

struct MaskF {
  __m256 m;
};
struct MaskD {
  __m256d low, high;
};

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = MaskF;
  static constexpr int lanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float s) { return {_mm256_set1_ps(s)}; }
  static Mask first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
  }
  static Mask from_bits(Bits bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit))};
  }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Mask = MaskD;
  static constexpr int lanes = 8;
  __m256d low, high;

  static Vec zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Vec broadcast(double s) { return {_mm256_set1_pd(s), _mm256_set1_pd(s)}; }
  static Mask first(int n) { return from_bits((1u << n) - 1); }
  static Mask from_bits(Bits bits) {
    const __m256i set = _mm256_set1_epi64x(static_cast<int64_t>(bits));
    const __m256i bit_low = _mm256_setr_epi64x(1, 2, 4, 8), bit_high = _mm256_setr_epi64x(16, 32, 64, 128);
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(set, bit_low), bit_low)),
            _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(set, bit_high), bit_high))};
  }
};

using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// min and max return their second operand if one is NaN.
inline F clamp(F a, F low, F high) { return {_mm256_max_ps(low.v, _mm256_min_ps(high.v, a.v))}; }
// 2^n for integers n.
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors, because 2^n alone may overflow or be subnormal.
inline F scale_by_power_of_two(F a, F n) {
  const __m256i integers = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(integers, 1);
  const __m256i rest = _mm256_sub_epi32(integers, half);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_two(half)), power_of_two(rest))};
}
inline MaskF greater_zero(F a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ)}; }
inline MaskF not_less_equal_zero(F a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ)}; }
inline MaskF greater_or_nan(F a, F b) {
  return {_mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
inline F maskz(MaskF m, F a) { return {_mm256_and_ps(m.m, a.v)}; }
inline F select(MaskF m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline Bits to_bits(MaskF m) { return static_cast<Bits>(_mm256_movemask_ps(m.m)); }

inline D operator+(D a, D b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
inline D operator-(D a, D b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
inline D operator*(D a, D b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
inline D operator/(D a, D b) { return {_mm256_div_pd(a.low, b.low), _mm256_div_pd(a.high, b.high)}; }
inline D fma(D a, D b, D c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
inline D clamp(D a, D low, D high) {
  return {_mm256_max_pd(low.low, _mm256_min_pd(high.low, a.low)),
          _mm256_max_pd(low.high, _mm256_min_pd(high.high, a.high))};
}
inline __m256d power_of_two(__m128i n) {
  const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(n), _mm256_set1_epi64x(1023));
  return _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
}
inline __m256d scale_by_power_of_two(__m256d a, __m256d n) {
  const __m128i integers = _mm256_cvtpd_epi32(n), half = _mm_srai_epi32(integers, 1);
  const __m128i rest = _mm_sub_epi32(integers, half);
  return _mm256_mul_pd(_mm256_mul_pd(a, power_of_two(half)), power_of_two(rest));
}
inline D scale_by_power_of_two(D a, D n) {
  return {scale_by_power_of_two(a.low, n.low), scale_by_power_of_two(a.high, n.high)};
}
inline MaskD greater_zero(D a) {
  const __m256d zero = _mm256_setzero_pd();
  return {_mm256_cmp_pd(a.low, zero, _CMP_GT_OQ), _mm256_cmp_pd(a.high, zero, _CMP_GT_OQ)};
}
inline MaskD not_less_equal_zero(D a) {
  const __m256d zero = _mm256_setzero_pd();
  return {_mm256_cmp_pd(a.low, zero, _CMP_NLE_UQ), _mm256_cmp_pd(a.high, zero, _CMP_NLE_UQ)};
}
inline __m256d greater_or_nan(__m256d a, __m256d b) {
  return _mm256_or_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ), _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
}
inline MaskD greater_or_nan(D a, D b) {
  return {greater_or_nan(a.low, b.low), greater_or_nan(a.high, b.high)};
}
inline D maskz(MaskD m, D a) { return {_mm256_and_pd(m.low, a.low), _mm256_and_pd(m.high, a.high)}; }
inline D select(MaskD m, D a, D b) {
  return {_mm256_blendv_pd(b.low, a.low, m.low), _mm256_blendv_pd(b.high, a.high, m.high)};
}
inline Bits to_bits(MaskD m) {
  return static_cast<Bits>(_mm256_movemask_pd(m.low) | _mm256_movemask_pd(m.high) << 4);
}

inline void accumulate(double* sums, D a) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), a.low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), a.high));
}
inline void accumulate(double* sums, F a) {
  accumulate(sums,
             D{_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))});
}

// --- float and double in memory ---
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F load(const float* p, int n) { return {_mm256_maskload_ps(p, _mm256_castps_si256(F::first(n).m))}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, F a, int n) { _mm256_maskstore_ps(p, _mm256_castps_si256(F::first(n).m), a.v); }
inline void stream(float* p, F a) { _mm256_stream_ps(p, a.v); }

inline D load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline D load(const double* p, int n) {
  const MaskD m = D::first(n);
  return {_mm256_maskload_pd(p, _mm256_castpd_si256(m.low)),
          _mm256_maskload_pd(p + 4, _mm256_castpd_si256(m.high))};
}
inline void store(double* p, D a) {
  _mm256_storeu_pd(p, a.low);
  _mm256_storeu_pd(p + 4, a.high);
}
inline void store(double* p, D a, int n) {
  const MaskD m = D::first(n);
  _mm256_maskstore_pd(p, _mm256_castpd_si256(m.low), a.low);
  _mm256_maskstore_pd(p + 4, _mm256_castpd_si256(m.high), a.high);
}
inline void stream(double* p, D a) {
  _mm256_stream_pd(p, a.low);
  _mm256_stream_pd(p + 4, a.high);
}

// --- 16-bit formats in memory ---
inline F widen(__m128i h, bfloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline F widen(__m128i h, float16) { return {_mm256_cvtph_ps(h)}; }
inline __m128i narrow(F a, bfloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(F a, float16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

template <class H>
inline F load(const H* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), H{});
}
template <class H>
inline F load(const H* p, int n) {
  H lanes[F::lanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class H>
inline void store(H* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, H{}));
}
template <class H>
inline void store(H* p, F a, int n) {
  H lanes[F::lanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class H>
inline void stream(H* p, F a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a, H{}));
}
template <class H>
inline F round_to(F a, H) {
  return widen(narrow(a, H{}), H{});
}

// --- indices within a pooling window, one byte each ---
inline void store_words(uint8_t* p, __m128i low, __m128i high) {
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline void store_bytes(uint8_t* p, F a) {
  const __m256i integers = _mm256_cvtps_epi32(a.v);
  store_words(p, _mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
}
inline void store_bytes(uint8_t* p, D a) {
  store_words(p, _mm256_cvtpd_epi32(a.low), _mm256_cvtpd_epi32(a.high));
}
template <class V>
inline typename V::Mask bytes_equal(const uint8_t* p, uint8_t value) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i equal = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)));
  if constexpr (sizeof(typename V::Scalar) == 4) {
    return {_mm256_castsi256_ps(_mm256_cvtepi8_epi32(equal))};
  } else {
    return {_mm256_castsi256_pd(_mm256_cvtepi8_epi64(equal)),
            _mm256_castsi256_pd(_mm256_cvtepi8_epi64(_mm_srli_si128(equal, 4)))};
  }
}

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace fused_res::cpu
