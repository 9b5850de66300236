// Vec for AVX-512 (F, BW, VL, DQ); vec.h defines the operations.
#pragma once

// GCC 12 warns about the undefined vectors in its own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fused_res::cpu {
namespace {

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int lanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static Mask from_bits(Bits bits) { return static_cast<Mask>(bits); }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Mask = __mmask8;
  static constexpr int lanes = 8;
  __m512d v;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec broadcast(double s) { return {_mm512_set1_pd(s)}; }
  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static Mask from_bits(Bits bits) { return static_cast<Mask>(bits); }
};

using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// min and max return their second operand if one is NaN.
inline F clamp(F a, F low, F high) { return {_mm512_max_ps(low.v, _mm512_min_ps(high.v, a.v))}; }
inline F scale_by_power_of_two(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline __mmask16 greater_zero(F a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ); }
inline __mmask16 not_less_equal_zero(F a) {
  return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ);
}
inline __mmask16 greater_or_nan(F a, F b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
}
inline F maskz(__mmask16 m, F a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
inline F select(__mmask16 m, F a, F b) { return {_mm512_mask_mov_ps(b.v, m, a.v)}; }

inline D operator+(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D operator/(D a, D b) { return {_mm512_div_pd(a.v, b.v)}; }
inline D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline D clamp(D a, D low, D high) { return {_mm512_max_pd(low.v, _mm512_min_pd(high.v, a.v))}; }
inline D scale_by_power_of_two(D a, D n) { return {_mm512_scalef_pd(a.v, n.v)}; }
inline __mmask8 greater_zero(D a) { return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_GT_OQ); }
inline __mmask8 not_less_equal_zero(D a) { return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
inline __mmask8 greater_or_nan(D a, D b) {
  return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ) | _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q);
}
inline D maskz(__mmask8 m, D a) { return {_mm512_maskz_mov_pd(m, a.v)}; }
inline D select(__mmask8 m, D a, D b) { return {_mm512_mask_mov_pd(b.v, m, a.v)}; }

inline Bits to_bits(__mmask16 m) { return m; }
inline Bits to_bits(__mmask8 m) { return m; }

inline void accumulate(double* sums, F a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}
inline void accumulate(double* sums, D a) {
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), a.v));
}

// --- float and double in memory ---
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const float* p, int n) { return {_mm512_maskz_loadu_ps(F::first(n), p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, F a, int n) { _mm512_mask_storeu_ps(p, F::first(n), a.v); }
inline void stream(float* p, F a) { _mm512_stream_ps(p, a.v); }

inline D load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline D load(const double* p, int n) { return {_mm512_maskz_loadu_pd(D::first(n), p)}; }
inline void store(double* p, D a) { _mm512_storeu_pd(p, a.v); }
inline void store(double* p, D a, int n) { _mm512_mask_storeu_pd(p, D::first(n), a.v); }
inline void stream(double* p, D a) { _mm512_stream_pd(p, a.v); }

// --- 16-bit formats in memory ---
inline F widen(__m256i h, bfloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F widen(__m256i h, float16) { return {_mm512_cvtph_ps(h)}; }
#if defined(__AVX512BF16__)
// Flushes denormals.
inline __m256i narrow(F a, bfloat16) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }
#else
inline __m256i narrow(F a, bfloat16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(high);
}
#endif
inline __m256i narrow(F a, float16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

template <class H>
inline F load(const H* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{});
}
template <class H>
inline F load(const H* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(F::first(n), p), H{});
}
template <class H>
inline void store(H* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, H{}));
}
template <class H>
inline void store(H* p, F a, int n) {
  _mm256_mask_storeu_epi16(p, F::first(n), narrow(a, H{}));
}
template <class H>
inline void stream(H* p, F a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, H{}));
}
template <class H>
inline F round_to(F a, H) {
  return widen(narrow(a, H{}), H{});
}

// --- indices within a pooling window, one byte each ---
inline void store_bytes(uint8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline void store_bytes(uint8_t* p, D a) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(a.v)));
}
template <class V>
inline typename V::Mask bytes_equal(const uint8_t* p, uint8_t value) {
  const __m128i bytes = V::lanes == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                       : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return static_cast<typename V::Mask>(_mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(value))));
}

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace fused_res::cpu
