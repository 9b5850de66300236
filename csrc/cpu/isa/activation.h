// Activations of the batch norm kernels, and their derivatives, on vectors. The formulas, also at the kinks,
// at infinity and at NaN, are those of PyTorch: see fused_res/ops/schemas.py.
#pragma once

#include "common/activation.h"
#include "common/normalize.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Constants of exp(): ln 2 as the sum of two parts, of which the product of the high one with an exponent is
// exact; 1.5 * 2^(significand bits), whose addition rounds to an integer; the arguments at which exp() is
// infinite and 0; and 1 / k!, in the order of Horner's scheme.
template <class S>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 0x1.8p23f, lowest = -104.0f, highest = 89.0f;
  static constexpr float inverse_factorials[] = {1 / 5040.0f, 1 / 720.0f, 1 / 120.0f,
                                                 1 / 24.0f,   1 / 6.0f,   1 / 2.0f};
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896338700;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 0x1.8p52, lowest = -746.0, highest = 710.0;
  static constexpr double inverse_factorials[] = {
      1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
      1 / 5040.0,       1 / 720.0,       1 / 120.0,      1 / 24.0,      1 / 6.0,      1 / 2.0};
};

// e^x with an error below 1.5 ulp, subnormal results included; NaN is propagated. Range reduction of Cody and
// Waite (Software Manual for the Elementary Functions, 1980, chapter 6): x = n ln 2 + r, |r| <= ln 2 / 2, and
// e^x = 2^n e^r. The Taylor polynomial of e^r, of degree 7 and 13, is truncated below a tenth of an ulp.
template <class S>
inline Vec<S> exp(Vec<S> x) {
  using V = Vec<S>;
  using C = ExpConstants<S>;
  x = clamp(x, V::broadcast(C::lowest), V::broadcast(C::highest));
  const V round = V::broadcast(C::round);
  const V n = fma(x, V::broadcast(C::log2e), round) - round;
  V r = fma(n, V::broadcast(-C::ln2_high), x);
  r = fma(n, V::broadcast(-C::ln2_low), r);
  V q = V::zero();
  for (const S coefficient : C::inverse_factorials) q = fma(q, r, V::broadcast(coefficient));
  return scale_by_power_of_two(V::broadcast(1) + fma(r * r, q, r), n);
}

template <class S>
inline Vec<S> sigmoid(Vec<S> z) {
  const Vec<S> one = Vec<S>::broadcast(1);
  return one / (one + exp(Vec<S>::zero() - z));
}

template <Activation kActivation, class S>
inline Vec<S> activate(Vec<S> z, [[maybe_unused]] Vec<S> negative_slope) {
  using V = Vec<S>;
  if constexpr (kActivation == Activation::kRelu) return maskz(relu_active(z), z);
  if constexpr (kActivation == Activation::kRelu6) return clamp(z, V::zero(), V::broadcast(6));
  if constexpr (kActivation == Activation::kLeakyRelu)
    return select(greater_zero(z), z, z * negative_slope);
  if constexpr (kActivation == Activation::kSilu)
    return z / (V::broadcast(1) + exp(V::zero() - z));
  return z;
}

// dy * act'(z). In a tail, the lanes after the end are 0 if those of dy are.
template <Activation kActivation, class Part, class S>
inline Vec<S> activation_backward(Part part, Vec<S> dy, Vec<S> z, [[maybe_unused]] Vec<S> negative_slope) {
  using V = Vec<S>;
  if constexpr (kActivation == Activation::kRelu) return maskz(relu_active(z), dy);
  if constexpr (kActivation == Activation::kRelu6) {
    // 6 - z <= 0 is z >= 6: the difference is 0 for z = 6 only.
    return maskz(relu_active(V::broadcast(6) - z), maskz(relu_active(z), dy));
  }
  if constexpr (kActivation == Activation::kLeakyRelu) return select(greater_zero(z), dy, dy * negative_slope);
  if constexpr (kActivation == Activation::kSilu) {
    const V one = V::broadcast(1), s = sigmoid(z);
    return part.zero_tail(dy * (s * fma(z, one - s, one)));
  }
  return dy;
}

}  // namespace
}  // namespace fused_res::cpu
