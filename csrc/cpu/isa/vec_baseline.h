// Vec for any machine, with GCC's vector extensions: eight lanes, which the compiler splits into the
// available registers (SSE2, NEON). vec.h defines the operations. Correctness is the aim: on an older machine
// the kernels save memory traffic, but are not tuned for cycles.
#pragma once

// "The ABI for passing parameters with 32-byte alignment has changed" does not matter: no function of this
// file is called from another translation unit.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fused_res::cpu {
namespace {

template <class S>
struct Lanes {
  typedef S Raw __attribute__((vector_size(8 * sizeof(S))));
};
using DoubleLanes = Lanes<double>::Raw;

template <class S>
struct Vec {
  using Scalar = S;
  using Raw = typename Lanes<S>::Raw;
  using Integers = decltype(Raw{} < Raw{});  // of the size of S
  struct Mask {
    Integers m;
  };
  static constexpr int lanes = 8;
  Raw v;

  static Vec zero() { return {Raw{}}; }
  static Vec broadcast(S s) { return {Raw{} + s}; }
  static Mask first(int n) { return from_bits((1u << n) - 1); }
  static Mask from_bits(Bits bits) {
    Mask mask;
    for (int i = 0; i < lanes; ++i) mask.m[i] = (bits >> i & 1) ? -1 : 0;
    return mask;
  }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend Vec clamp(Vec a, Vec low, Vec high) {
    a = select({a.v > high.v}, high, a);
    return select({a.v < low.v}, low, a);
  }
  // In two factors, because 2^n alone may overflow or be subnormal.
  friend Vec scale_by_power_of_two(Vec a, Vec n) {
    const Integers integers = __builtin_convertvector(n.v, Integers), half = integers >> 1;
    const Integers rest = integers - half;
    constexpr int bias = sizeof(S) == 4 ? 127 : 1023, significand_bits = sizeof(S) == 4 ? 23 : 52;
    return {a.v * (Raw)((half + bias) << significand_bits) * (Raw)((rest + bias) << significand_bits)};
  }
  friend Mask greater_zero(Vec a) { return {a.v > Raw{}}; }
  // Without an FMA instruction this is a multiplication and an addition, as in all other code; never libm's
  // fma, which takes a hundred cycles per lane.
  friend Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
    for (int i = 0; i < lanes; ++i) {
      c.v[i] =
          sizeof(S) == 4 ? __builtin_fmaf(a.v[i], b.v[i], c.v[i]) : __builtin_fma(a.v[i], b.v[i], c.v[i]);
    }
    return c;
#else
    return {a.v * b.v + c.v};
#endif
  }
  friend Mask not_less_equal_zero(Vec a) { return {~(a.v <= Raw{})}; }
  friend Mask greater_or_nan(Vec a, Vec b) { return {(a.v > b.v) | (a.v != a.v)}; }
  friend Vec maskz(Mask m, Vec a) { return {m.m ? a.v : Raw{}}; }
  friend Vec select(Mask m, Vec a, Vec b) { return {m.m ? a.v : b.v}; }
  friend Bits to_bits(Mask m) {
    Bits bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= (m.m[i] & 1u) << i;
    return bits;
  }
  friend void accumulate(double* sums, Vec a) {
    DoubleLanes total;
    memcpy(&total, sums, sizeof(total));
    total += __builtin_convertvector(a.v, DoubleLanes);
    memcpy(sums, &total, sizeof(total));
  }
  friend void store_bytes(uint8_t* p, Vec a) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
  }
};

template <class V>
inline typename V::Mask bytes_equal(const uint8_t* p, uint8_t value) {
  typename V::Mask mask;
  for (int i = 0; i < V::lanes; ++i) mask.m[i] = p[i] == value ? -1 : 0;
  return mask;
}

// --- 16-bit formats, scalar conversions ---
inline float from_float_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t float_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  return bits;
}

inline float widen(bfloat16 h) { return from_float_bits(static_cast<uint32_t>(h.bits) << 16); }
inline bfloat16 narrow(float f, bfloat16) {
  const uint32_t bits = float_bits(f);
  if (f != f) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float widen(float16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  float f;
  if (magnitude >= 0x7c00) {
    f = from_float_bits(0x7f800000u | (magnitude & 0x3ff) << 13);
  } else {
    // The shifted exponent field is too small by 112. Multiplying by a power of two is exact, also for
    // subnormal numbers.
    f = from_float_bits(magnitude << 13) * 0x1p112f;
  }
  return from_float_bits(float_bits(f) | sign);
}
inline float16 narrow(float f, float16) {
  const uint32_t sign = float_bits(f) >> 16 & 0x8000u;
  const uint32_t magnitude = float_bits(f) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest float16 and 2^16: infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to units of 2^-24
    half = float_bits(from_float_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// --- memory ---
template <class S>
inline Vec<S> load_lanes(const S* p, int n) {
  Vec<S> a = Vec<S>::zero();
  memcpy(&a.v, p, static_cast<size_t>(n) * sizeof(S));
  return a;
}
inline Vec<float> load(const float* p) { return load_lanes(p, 8); }
inline Vec<float> load(const float* p, int n) { return load_lanes(p, n); }
inline Vec<double> load(const double* p) { return load_lanes(p, 8); }
inline Vec<double> load(const double* p, int n) { return load_lanes(p, n); }
// Not inlined: a conversion takes about forty instructions per lane, and the kernels contain many.
template <class H>
__attribute__((noinline)) Vec<float> load(const H* p, int n) {
  Vec<float> a = Vec<float>::zero();
  for (int i = 0; i < n; ++i) a.v[i] = widen(p[i]);
  return a;
}
template <class H>
inline Vec<float> load(const H* p) {
  return load(p, 8);
}

inline void store(float* p, Vec<float> a, int n) { memcpy(p, &a.v, static_cast<size_t>(n) * sizeof(*p)); }
inline void store(double* p, Vec<double> a, int n) { memcpy(p, &a.v, static_cast<size_t>(n) * sizeof(*p)); }
template <class H>
__attribute__((noinline)) void store(H* p, Vec<float> a, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow(a.v[i], H{});
}
template <class T, class S>
inline void store(T* p, Vec<S> a) {
  store(p, a, 8);
}
template <class T, class S>
inline void stream(T* p, Vec<S> a) {
  store(p, a, 8);
}
inline void stream_fence() {}

template <class H>
inline Vec<float> round_to(Vec<float> a, H) {
  H lanes[8];
  store(lanes, a, 8);
  return load(lanes, 8);
}

}  // namespace
}  // namespace fused_res::cpu
