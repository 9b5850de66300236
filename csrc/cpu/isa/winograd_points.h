// Winograd's minimal filtering for 3 taps (Toom-Cook by interpolation), in one dimension.
//
//   y = A^T [ (G g) * (B^T d) ]    Lavin & Gray 2016, https://arxiv.org/abs/1509.09308
//
// F(m): m outputs from m + 2 inputs with m + 2 products, one for each point of interpolation: 0, +a, -a, +b,
// -b and infinity. G evaluates the kernel as a polynomial at the points, A^T is the transpose of such an
// evaluation, and B^T holds the coefficients of the Lagrange polynomials. a = 5/8 and b = 3/2 instead of 1
// and 2 cut the error 2.2x.
//
// Smaller tiles take a subset of the same points, F(3) without -b and F(2) without +b and -b, and so the same
// transformed kernel G g: its scale is that of F(4), and what differs for a smaller tile is in its B^T. So 14
// rows are 4 + 4 + 4 + 2 and take 22 instead of 24 products, with no other weights.
#pragma once

#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

constexpr int kTaps = 3;
constexpr int kPoints = 6;
constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;

// The l-th point of F(m).
constexpr int point_of(int m, int l) { return l == m + 1 ? kPoints - 1 : l; }

// G: the kernel's value at every point, in double because it is done once for many uses.
inline void transform_kernel(double g0, double g1, double g2, double (&u)[kPoints]) {
  constexpr double at_a = 1 / (2 * kA2 * (kA2 - kB2)), at_b = 1 / (2 * kB2 * (kB2 - kA2));
  u[0] = g0 * (1 / (kA2 * kB2));
  u[1] = (g0 + kA2 * g2 + kA * g1) * at_a;
  u[2] = (g0 + kA2 * g2 - kA * g1) * at_a;
  u[3] = (g0 + kB2 * g2 + kB * g1) * at_b;
  u[4] = (g0 + kB2 * g2 - kB * g1) * at_b;
  u[5] = g2;
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

// B^T: from m + 2 inputs the products' factors, those of the points that F(m) has, in their order.
template <int M, class V>
inline void transform_input(const V* d, V* t) {
  if constexpr (M == 4) {
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
  } else {  // without +b and -b
    t[0] = times(-kB2, plus(d[2], -kA2, d[0]));
    t[1] = times(kA2 - kB2, plus(d[2], kA, d[1]));
    t[2] = times(kA2 - kB2, plus(d[2], -kA, d[1]));
    t[3] = plus(d[3], -kA2, d[1]);
  }
}

// A^T: from the products m outputs.
template <int M, class V>
inline void transform_output(const V* t, V* y) {
  const V sum_a = t[1] + t[2], difference_a = t[1] - t[2];
  if constexpr (M == 2) {
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
template <int M, class V>
inline void transform_gradient(const V* y, V* t) {
  if constexpr (M == 2) {
    const V odd_a = times(kA, y[1]);
    t[0] = y[0];
    t[1] = y[0] + odd_a;
    t[2] = y[0] - odd_a;
    t[3] = y[1];
  } else {
    const V even_a = plus(y[0], kA2, y[2]), even_b = plus(y[0], kB2, y[2]);
    if constexpr (M == 3) {
      const V odd_a = times(kA, y[1]);
      t[0] = y[0];
      t[1] = even_a + odd_a;
      t[2] = even_a - odd_a;
      t[3] = plus(even_b, kB, y[1]);
      t[4] = y[2];
    } else {
      const V odd_a = times(kA, plus(y[1], kA2, y[3])), odd_b = times(kB, plus(y[1], kB2, y[3]));
      t[0] = y[0];
      t[1] = even_a + odd_a;
      t[2] = even_a - odd_a;
      t[3] = even_b + odd_b;
      t[4] = even_b - odd_b;
      t[5] = y[3];
    }
  }
}

// G^T: from the gradients of the transformed kernel those of its taps.
template <class V>
inline void transform_weight_gradient(const V* u, V* g) {
  constexpr double at_a = 1 / (2 * kA2 * (kA2 - kB2)), at_b = 1 / (2 * kB2 * (kB2 - kA2));
  const V sum_a = times(at_a, u[1] + u[2]), sum_b = times(at_b, u[3] + u[4]);
  g[0] = plus(sum_a + sum_b, 1 / (kA2 * kB2), u[0]);
  g[1] = plus(times(kA * at_a, u[1] - u[2]), kB * at_b, u[3] - u[4]);
  g[2] = plus(plus(u[5], kA2, sum_a), kB2, sum_b);
}

}  // namespace
}  // namespace fused_res::cpu
