// The one-dimensional Winograd transforms F(m, 3) (Toom-Cook by interpolation).
//
//   y = A^T [ (G g) * (B^T d) ]    Lavin & Gray 2015, https://arxiv.org/abs/1509.09308
//
// F(m) with stride 1 computes m outputs from m + 2 inputs with m + 2 multiplications, one per interpolation
// point: 0, +a, -a, +b, -b and infinity. G evaluates the filter as a polynomial at the points, A^T is the
// transpose of such an evaluation, and B^T holds the coefficients of the Lagrange polynomials. a = 5/8 and
// b = 3/2 instead of 1 and 2 reduce the error 2.2x.
//
// Smaller tiles use a subset of the same points, F(3) without -b and F(2) without +b and -b, and therefore
// the same transformed filter G g, scaled as for F(4); the scale factors that differ for a smaller tile are
// in its B^T. An image of 14 rows is tiled as 4 + 4 + 4 + 2 and needs 22 multiplications instead of 24, with
// one transformed filter for all tile sizes.
//
// With stride 2, the two outer taps read every other input and form a 2-tap filter with stride 1. Its F(m, 2)
// has m + 1 points, those of F(m - 1, 3), and the same B^T. The middle tap reads the inputs between them and
// needs m multiplications. 4 outputs take 9 multiplications instead of 12, and in two dimensions 81 instead
// of 144.
#pragma once

#include "cpu/isa/tiles.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kScaleZero = 1 / (kA2 * kB2), kScaleA = 1 / (2 * kA2 * (kA2 - kB2)),
                 kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

// Filter transform G g: the filter's value at every point. V: doubles, because it is done once for many uses.
template <class V>
inline void transform_filter(int64_t stride, V g0, V g1, V g2, V (&u)[kPoints]) {
  u[0] = g0 * kScaleZero;
  u[kInfinity] = g2;
  if (stride == 1) {
    u[1] = (g0 + kA2 * g2 + kA * g1) * kScaleA;
    u[2] = (g0 + kA2 * g2 - kA * g1) * kScaleA;
    u[3] = (g0 + kB2 * g2 + kB * g1) * kScaleB;
    u[4] = (g0 + kB2 * g2 - kB * g1) * kScaleB;
  } else {
    u[1] = (g0 + kA * g2) * kScaleA;
    u[2] = (g0 - kA * g2) * kScaleA;
    u[3] = (g0 + kB * g2) * kScaleB;
    u[kMiddleTap] = g1;
  }
}

template <class V>
inline V times(double s, V v) {
  return V::broadcast(static_cast<float>(s)) * v;
}
// c + s * v
template <class V>
inline V add_scaled(V c, double s, V v) {
  return fma(V::broadcast(static_cast<float>(s)), v, c);
}

// Input transform B^T d: from alpha(S, M) inputs to as many transform-domain elements, in the order of
// tiles.h.
template <int S, int M, class V>
inline void transform_input(const V* d, V* t) {
  if constexpr (S == 2) {
    V outer[M + 1];
#pragma GCC unroll 5
    for (int i = 0; i <= M; ++i) outer[i] = d[2 * i];
    transform_input<1, M - 1>(outer, t);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) t[M + 1 + i] = d[2 * i + 1];
  } else if constexpr (M == 4) {
    const V even_a = add_scaled(d[4], -kB2, d[2]), odd_a = add_scaled(d[3], -kB2, d[1]);
    const V even_b = add_scaled(d[4], -kA2, d[2]), odd_b = add_scaled(d[3], -kA2, d[1]);
    t[0] = add_scaled(add_scaled(d[4], -(kA2 + kB2), d[2]), kA2 * kB2, d[0]);
    t[1] = add_scaled(even_a, kA, odd_a);
    t[2] = add_scaled(even_a, -kA, odd_a);
    t[3] = add_scaled(even_b, kB, odd_b);
    t[4] = add_scaled(even_b, -kB, odd_b);
    t[5] = add_scaled(add_scaled(d[5], -(kA2 + kB2), d[3]), kA2 * kB2, d[1]);
  } else if constexpr (M == 3) {  // without -b: scaled by each point's distance to -b
    const V cube = add_scaled(d[3], -kA2, d[1]), square = add_scaled(d[2], -kA2, d[0]);
    t[0] = add_scaled(times(kB, cube), -kB2, square);
    t[1] = times(kA + kB, add_scaled(add_scaled(d[3], kA - kB, d[2]), -kA * kB, d[1]));
    t[2] = times(kB - kA, add_scaled(add_scaled(d[3], -(kA + kB), d[2]), kA * kB, d[1]));
    t[3] = times(2 * kB, cube);
    t[4] = add_scaled(add_scaled(d[4], -kA2, d[2]), -kB, cube);
  } else if constexpr (M == 2) {  // without +b and -b
    t[0] = times(-kB2, add_scaled(d[2], -kA2, d[0]));
    t[1] = times(kA2 - kB2, add_scaled(d[2], kA, d[1]));
    t[2] = times(kA2 - kB2, add_scaled(d[2], -kA, d[1]));
    t[3] = add_scaled(d[3], -kA2, d[1]);
  } else {  // F(1, 3), for the outer taps of stride 2: without -a as well
    t[0] = times(-kA * kB2, add_scaled(d[1], -kA, d[0]));
    t[1] = times(2 * kA * (kA2 - kB2), d[1]);
    t[2] = add_scaled(d[2], -kA, d[1]);
  }
}

// Output transform A^T t: from the transform-domain products to m outputs.
template <int S, int M, class V>
inline void transform_output(const V* t, V* y) {
  const V sum_a = t[1] + t[2], difference_a = t[1] - t[2];
  if constexpr (S == 2) {
    if constexpr (M == 2) {
      y[0] = t[0] + t[1];
      y[1] = add_scaled(t[2], kA, t[1]);
    } else if constexpr (M == 3) {
      y[0] = t[0] + sum_a;
      y[1] = times(kA, difference_a);
      y[2] = add_scaled(t[3], kA2, sum_a);
    } else {
      y[0] = t[0] + sum_a + t[3];
      y[1] = add_scaled(times(kB, t[3]), kA, difference_a);
      y[2] = add_scaled(times(kB2, t[3]), kA2, sum_a);
      y[3] = add_scaled(add_scaled(t[4], kB2 * kB, t[3]), kA2 * kA, difference_a);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) y[i] = y[i] + t[M + 1 + i];
  } else if constexpr (M == 2) {
    y[0] = t[0] + sum_a;
    y[1] = add_scaled(t[3], kA, difference_a);
  } else if constexpr (M == 3) {
    y[0] = t[0] + sum_a + t[3];
    y[1] = add_scaled(times(kB, t[3]), kA, difference_a);
    y[2] = add_scaled(add_scaled(t[4], kB2, t[3]), kA2, sum_a);
  } else {
    const V sum_b = t[3] + t[4], difference_b = t[3] - t[4];
    y[0] = t[0] + sum_a + sum_b;
    y[1] = add_scaled(times(kB, difference_b), kA, difference_a);
    y[2] = add_scaled(times(kB2, sum_b), kA2, sum_a);
    y[3] = add_scaled(add_scaled(t[5], kB2 * kB, difference_b), kA2 * kA, difference_a);
  }
}

// A dy, the transpose of the output transform: from the gradients of m outputs to those of the
// transform-domain products, in the order of tiles.h.
template <int S, int M, class V>
inline void transform_grad_output(const V* y, V* t) {
  constexpr int kLast = num_points(S, M) - 1;
  t[0] = y[0];
  t[kLast] = y[M - 1];
  if constexpr (S == 2) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) t[M + 1 + i] = y[i];
  }
  // The polynomial with coefficients y at +p and -p is the sum and the difference of its even and odd part.
  V even_a = y[0], odd_a = times(kA, y[1]), even_b = y[0], odd_b = times(kB, y[1]);
  if constexpr (M > 2) even_a = add_scaled(even_a, kA2, y[2]), even_b = add_scaled(even_b, kB2, y[2]);
  if constexpr (M > 3) odd_a = add_scaled(odd_a, kA2 * kA, y[3]), odd_b = add_scaled(odd_b, kB2 * kB, y[3]);
  if constexpr (kLast > 1) t[1] = even_a + odd_a;
  if constexpr (kLast > 2) t[2] = even_a - odd_a;
  if constexpr (kLast > 3) t[3] = even_b + odd_b;
  if constexpr (kLast > 4) t[4] = even_b - odd_b;
}

// G^T du, the transpose of the filter transform: from the gradient of the transformed filter to that of its
// taps.
template <int S, class V>
inline void transform_grad_filter(const V* u, V* g) {
  const V sum_a = times(kScaleA, u[1] + u[2]);
  if constexpr (S == 2) {
    g[0] = add_scaled(add_scaled(sum_a, kScaleB, u[3]), kScaleZero, u[0]);
    g[1] = u[kMiddleTap];
    g[2] = add_scaled(add_scaled(u[kInfinity], kB * kScaleB, u[3]), kA * kScaleA, u[1] - u[2]);
  } else {
    const V sum_b = times(kScaleB, u[3] + u[4]);
    g[0] = add_scaled(sum_a + sum_b, kScaleZero, u[0]);
    g[1] = add_scaled(times(kA * kScaleA, u[1] - u[2]), kB * kScaleB, u[3] - u[4]);
    g[2] = add_scaled(add_scaled(u[kInfinity], kB2, sum_b), kA2, sum_a);
  }
}

}  // namespace
}  // namespace fused_res::cpu
