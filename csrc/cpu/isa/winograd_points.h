// Winograd's minimal filtering for 3 taps (Toom-Cook by interpolation), in one dimension.
//
//   y = A^T [ (G g) * (B^T d) ]    Lavin & Gray 2016, https://arxiv.org/abs/1509.09308
//
// F(m) with stride 1: m outputs from m + 2 inputs with m + 2 products, one for each point of interpolation:
// 0, +a, -a, +b, -b and infinity. G evaluates the kernel as a polynomial at the points, A^T is the transpose
// of such an evaluation, and B^T holds the coefficients of the Lagrange polynomials. a = 5/8 and b = 3/2
// instead of 1 and 2 cut the error 2.2x.
//
// Smaller tiles take a subset of the same points, F(3) without -b and F(2) without +b and -b, and so the same
// transformed kernel G g: its scale is that of F(4), and what differs for a smaller tile is in its B^T. So 14
// rows are 4 + 4 + 4 + 2 and take 22 instead of 24 products, with no other weights.
//
// With stride 2 the outer taps meet every other input: as a kernel of 2 taps with stride 1, whose F(m) has m
// + 1 points, those of F(m - 1) for 3 taps, and the same B^T. The tap in the middle meets the inputs between,
// by itself: m products. So 4 outputs take 9 products instead of 12, and in two dimensions 81 instead of 144.
#pragma once

#include "cpu/isa/tiles.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kAtZero = 1 / (kA2 * kB2), kAtA = 1 / (2 * kA2 * (kA2 - kB2)),
                 kAtB = 1 / (2 * kB2 * (kB2 - kA2));

// G: the kernel's value at every point, in double because it is done once for many uses.
inline void transform_kernel(int64_t stride, double g0, double g1, double g2, double (&u)[kPoints]) {
  u[0] = g0 * kAtZero;
  u[kInfinity] = g2;
  if (stride == 1) {
    u[1] = (g0 + kA2 * g2 + kA * g1) * kAtA;
    u[2] = (g0 + kA2 * g2 - kA * g1) * kAtA;
    u[3] = (g0 + kB2 * g2 + kB * g1) * kAtB;
    u[4] = (g0 + kB2 * g2 - kB * g1) * kAtB;
  } else {
    u[1] = (g0 + kA * g2) * kAtA;
    u[2] = (g0 - kA * g2) * kAtA;
    u[3] = (g0 + kB * g2) * kAtB;
    u[kMiddle] = g1;
  }
}

template <class V>
inline V times(double s, V v) {
  return V::all(static_cast<float>(s)) * v;
}
// c + s * v
template <class V>
inline V plus(V c, double s, V v) {
  return fma(V::all(static_cast<float>(s)), v, c);
}

// B^T: from the inputs the products' factors, those of the points that F(m) has, in their order.
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
    const V even_a = plus(d[4], -kB2, d[2]), odd_a = plus(d[3], -kB2, d[1]);
    const V even_b = plus(d[4], -kA2, d[2]), odd_b = plus(d[3], -kA2, d[1]);
    t[0] = plus(plus(d[4], -(kA2 + kB2), d[2]), kA2 * kB2, d[0]);
    t[1] = plus(even_a, kA, odd_a);
    t[2] = plus(even_a, -kA, odd_a);
    t[3] = plus(even_b, kB, odd_b);
    t[4] = plus(even_b, -kB, odd_b);
    t[5] = plus(plus(d[5], -(kA2 + kB2), d[3]), kA2 * kB2, d[1]);
  } else if constexpr (M == 3) {  // without -b: times the distance of each point to it
    const V cube = plus(d[3], -kA2, d[1]), square = plus(d[2], -kA2, d[0]);
    t[0] = plus(times(kB, cube), -kB2, square);
    t[1] = times(kA + kB, plus(plus(d[3], kA - kB, d[2]), -kA * kB, d[1]));
    t[2] = times(kB - kA, plus(plus(d[3], -(kA + kB), d[2]), kA * kB, d[1]));
    t[3] = times(2 * kB, cube);
    t[4] = plus(plus(d[4], -kA2, d[2]), -kB, cube);
  } else if constexpr (M == 2) {  // without +b and -b
    t[0] = times(-kB2, plus(d[2], -kA2, d[0]));
    t[1] = times(kA2 - kB2, plus(d[2], kA, d[1]));
    t[2] = times(kA2 - kB2, plus(d[2], -kA, d[1]));
    t[3] = plus(d[3], -kA2, d[1]);
  } else {  // without -a as well
    t[0] = times(-kA * kB2, plus(d[1], -kA, d[0]));
    t[1] = times(2 * kA * (kA2 - kB2), d[1]);
    t[2] = plus(d[2], -kA, d[1]);
  }
}

// A^T: from the products m outputs.
template <int S, int M, class V>
inline void transform_output(const V* t, V* y) {
  const V sum_a = t[1] + t[2], difference_a = t[1] - t[2];
  if constexpr (S == 2) {
    if constexpr (M == 2) {
      y[0] = t[0] + t[1];
      y[1] = plus(t[2], kA, t[1]);
    } else if constexpr (M == 3) {
      y[0] = t[0] + sum_a;
      y[1] = times(kA, difference_a);
      y[2] = plus(t[3], kA2, sum_a);
    } else {
      y[0] = t[0] + sum_a + t[3];
      y[1] = plus(times(kB, t[3]), kA, difference_a);
      y[2] = plus(times(kB2, t[3]), kA2, sum_a);
      y[3] = plus(plus(t[4], kB2 * kB, t[3]), kA2 * kA, difference_a);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) y[i] = y[i] + t[M + 1 + i];
  } else if constexpr (M == 2) {
    y[0] = t[0] + sum_a;
    y[1] = plus(t[3], kA, difference_a);
  } else if constexpr (M == 3) {
    y[0] = t[0] + sum_a + t[3];
    y[1] = plus(times(kB, t[3]), kA, difference_a);
    y[2] = plus(plus(t[4], kB2, t[3]), kA2, sum_a);
  } else {
    const V sum_b = t[3] + t[4], difference_b = t[3] - t[4];
    y[0] = t[0] + sum_a + sum_b;
    y[1] = plus(times(kB, difference_b), kA, difference_a);
    y[2] = plus(times(kB2, sum_b), kA2, sum_a);
    y[3] = plus(plus(t[5], kB2 * kB, difference_b), kA2 * kA, difference_a);
  }
}

// A: from the gradients of m outputs those of the products that F(m) has, in their order.
template <int S, int M, class V>
inline void transform_gradient(const V* y, V* t) {
  constexpr int kLast = points_of(S, M) - 1;
  t[0] = y[0];
  t[kLast] = y[M - 1];
  if constexpr (S == 2) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) t[M + 1 + i] = y[i];
  }
  // At +p and -p, and at p alone, the even and the odd part.
  V even_a = y[0], odd_a = times(kA, y[1]), even_b = y[0], odd_b = times(kB, y[1]);
  if constexpr (M > 2) even_a = plus(even_a, kA2, y[2]), even_b = plus(even_b, kB2, y[2]);
  if constexpr (M > 3) odd_a = plus(odd_a, kA2 * kA, y[3]), odd_b = plus(odd_b, kB2 * kB, y[3]);
  if constexpr (kLast > 1) t[1] = even_a + odd_a;
  if constexpr (kLast > 2) t[2] = even_a - odd_a;
  if constexpr (kLast > 3) t[3] = even_b + odd_b;
  if constexpr (kLast > 4) t[4] = even_b - odd_b;
}

// G^T: from the gradients of the transformed kernel those of its taps.
template <int S, class V>
inline void transform_weight_gradient(const V* u, V* g) {
  const V sum_a = times(kAtA, u[1] + u[2]);
  if constexpr (S == 2) {
    g[0] = plus(plus(sum_a, kAtB, u[3]), kAtZero, u[0]);
    g[1] = u[kMiddle];
    g[2] = plus(plus(u[kInfinity], kB * kAtB, u[3]), kA * kAtA, u[1] - u[2]);
  } else {
    const V sum_b = times(kAtB, u[3] + u[4]);
    g[0] = plus(sum_a + sum_b, kAtZero, u[0]);
    g[1] = plus(times(kA * kAtA, u[1] - u[2]), kB * kAtB, u[3] - u[4]);
    g[2] = plus(plus(u[kInfinity], kB2, sum_b), kA2, sum_a);
  }
}

}  // namespace
}  // namespace fused_res::cpu
