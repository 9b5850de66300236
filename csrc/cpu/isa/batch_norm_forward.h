// batch_norm_act forward: the statistics, a version for each layout, and the elementwise pass, written once
// for both.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/batch_norm_sums.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// --- statistics ---

// The first rows (NHWC) or vectors (NCHW) of a chunk, the pilot, say where the origin lies that its values
// are taken relative to. With n values in a chunk and k in the pilot, the cancellation in M2 is about (1 + n
// / k) eps if the pilot is an outlier, else near 1 eps. So that a single value cannot be one, it is the
// median of the means of three parts.
constexpr int kPilot = 15;

constexpr int64_t pilot_parts(int64_t pilot) { return pilot < 3 ? 1 : 3; }

template <class S>
inline S median(const S (&of)[3]) {
  const S low = of[0] < of[1] ? of[0] : of[1], high = of[0] < of[1] ? of[1] : of[0];
  return of[2] < low ? low : (of[2] < high ? of[2] : high);
}

// The origin must be a number: x - infinity would turn infinity into NaN everywhere.
template <class S>
inline S finite_or_zero(S origin) {
  return origin - origin == S(0) ? origin : S(0);
}

// Whether the origin makes most of the squares cancel: it is more than two deviations from the mean, as where
// an image begins with a black border. Seen in one chunk in a thousand of a ResNet on
// smooth images.
inline bool cancels(double sum, double squares, double count) { return sum * sum > 0.8 * count * squares; }

// Then the moments of `n` values in each of some images are taken again, about the mean itself.
template <class T>
Moments moments_about(double origin, const T* first, int64_t images, int64_t image, int64_t n,
                      int64_t stride) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double d = static_cast<double>(element(first + i * image + k * stride)) - origin;
      sum += d, squares += d * d;
    }
  }
  return moments_from_sums(origin, sum, squares, static_cast<double>(images * n));
}

template <class T>
void moments_nhwc(const Block& b, const void* x, double* partial) {
  using S = Compute<T>;
  using V = Vec<S>;
  const int64_t rows = b.n1 - b.n0, pilot = smaller(rows, kPilot);
  const int64_t parts = pilot_parts(pilot), part_rows = pilot / parts;
  for (int64_t c0 = b.c0; c0 < b.c1; c0 += kSummedChannels) {
    const int64_t width = smaller(kSummedChannels, b.c1 - c0);
    const T* first = static_cast<const T*>(x) + b.n0 * b.channels + c0;
    alignas(64) S origin[kSummedChannels];
    double sums[2][kSummedChannels];
    const auto sum_above_origin = [&](const T* from, int64_t n) {
      const auto above_origin = [&](auto part, int64_t row, int64_t c) {
        const V d = part.load(from + row * b.channels + c) - load(origin + c);
        return Term<V, 1>{d, {d}};
      };
      sum_rows<V>(n, width, b.channels, sums, above_origin, from);
    };
    for (int64_t c = 0; c < width; ++c) origin[c] = element(first + c);
    S means[kSummedChannels][3];
    for (int64_t i = 0; i < 3; ++i) {
      if (i < parts) sum_above_origin(first + i * part_rows * b.channels, part_rows);
      for (int64_t c = 0; c < width; ++c)
        means[c][i] = static_cast<S>(sums[0][c]) / static_cast<S>(part_rows);
    }
    for (int64_t c = 0; c < width; ++c) origin[c] = finite_or_zero(origin[c] + median(means[c]));
    sum_above_origin(first, rows);
    for (int64_t c = 0; c < width; ++c) {
      const auto count = static_cast<double>(rows);
      Moments m = moments_from_sums(origin[c], sums[0][c], sums[1][c], count);
      if (cancels(sums[0][c], sums[1][c], count))
        m = moments_about(m.mean, first + c, 1, 0, rows, b.channels);
      partial[c0 + c] = m.mean;
      partial[b.channels + c0 + c] = m.m2;
    }
  }
}

template <class T>
void moments_nchw(const Block& b, const void* x, double* partial) {
  using S = Compute<T>;
  using V = Vec<S>;
  const int64_t length = b.s1 - b.s0, pilot = smaller(length, kPilot * V::lanes);
  const int64_t parts = pilot_parts(pilot), part_length = pilot / parts;
  for (int64_t c = b.c0; c < b.c1; ++c) {
    const T* first = static_cast<const T*>(x) + c * b.spatial + b.s0;
    const int64_t image = b.channels * b.spatial;

    const T* pilot_plane = first + b.n0 * image;
    const S start = element(pilot_plane);
    S means[3];
    for (int64_t i = 0; i < 3; ++i) {
      V sum = V::zero();
      for_each_vector<V>(part_length, [&](auto part, int64_t k) {
        sum = sum + part.only(part.load(pilot_plane + i % parts * part_length + k) - V::all(start));
      });
      means[i] = total(sum) / static_cast<S>(part_length);
    }
    const V origin = V::all(finite_or_zero(start + median(means)));

    PlaneSums<V, 2> plane_sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      plane_sums.add(length, [&](auto part, int64_t i) {
        const V d = part.only(part.load(first + n * image + i) - origin);
        return Term<V, 1>{d, {d}};
      });
    }
    double sums[2];
    plane_sums.finish(sums, 1);
    const auto count = static_cast<double>((b.n1 - b.n0) * length);
    Moments m = moments_from_sums(first_lane(origin), sums[0], sums[1], count);
    if (cancels(sums[0], sums[1], count))
      m = moments_about(m.mean, first + b.n0 * image, b.n1 - b.n0, image, length, 1);
    partial[c] = m.mean;
    partial[b.channels + c] = m.m2;
  }
}

// --- normalise, add, clamp ---

// One norm along a run of memory.
template <Layout L, class S>
struct Norm {
  using Factor = typename FactorOf<L, S>::type;
  Factor mean, scale, shift;

  Norm(const NormArgs& a, int64_t channel)
      : mean{static_cast<const S*>(a.mean) + channel},
        scale{static_cast<const S*>(a.scale) + channel},
        shift{static_cast<const S*>(a.shift) + channel} {}

  template <class Part>
  Vec<S> centred(Part part, Vec<S> v, int64_t i) const {
    return v - mean.at(part, i);
  }
  template <class Part>
  Vec<S> operator()(Part part, Vec<S> v, int64_t i) const {
    return normalize(centred(part, v, i), scale.at(part, i), shift.at(part, i));
  }
};

template <class T, Layout L, bool kPair>
void forward(const Block& b, const ForwardArgs& a) {
  using S = Compute<T>;
  using V = Vec<S>;
  const bool relu = a.relu, stream = a.stream;
  for_each_run<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
    const Norm<L, S> norm(a.norm, channel);
    // Used in a pair only, but it has to point at something.
    const Norm<L, S> residual_norm(kPair ? a.residual_norm : a.norm, channel);
    const T* x = static_cast<const T*>(a.x) + start;
    const T* residual = static_cast<const T*>(a.residual) + (a.residual ? start : 0);
    T* y = static_cast<T*>(a.y) + start;
    uint8_t* mask = a.mask ? a.mask + mask_start : nullptr;
    for_each_vector<V>(n, [&](auto part, int64_t i) {
      V v = norm(part, part.load(x + i), i);
      if constexpr (kPair) {
        v = v + residual_norm(part, part.load(residual + i), i);
      } else if (residual) {
        v = v + part.load(residual + i);
      }
      const auto active = relu_active(v);
      if (mask) store_bits<V>(mask + i / 8, to_bits(active), part);
      if (relu) v = keep(active, v);
      put(part, y + i, v, stream);
    });
  });
  if (stream) stream_fence();
}

template <class T, Layout L>
void forward(const Block& b, const ForwardArgs& a) {
  if (a.residual_norm.mean) return forward<T, L, true>(b, a);
  forward<T, L, false>(b, a);
}

// --- between the passes: one number a channel ---

template <class S>
void finish(void* stats, const double* moments, double count, const ParamArgs& params, int64_t channels,
            int64_t c0, int64_t c1) {
  S* out = static_cast<S*>(stats);
  const S* weight = static_cast<const S*>(params.weight);
  const S* bias = static_cast<const S*>(params.bias);
  for (int64_t c = c0; c < c1; ++c) {
    const double m2 = moments[channels + c], var = m2 / count;
    const double invstd = 1.0 / __builtin_sqrt(var + params.eps);
    const ChannelStats<S> s =
        channel_stats<S>(moments[c], invstd, weight ? weight[c] : S(1), bias ? bias[c] : S(0));
    out[kMean * channels + c] = s.mean;
    out[kInvstd * channels + c] = s.invstd;
    out[kScale * channels + c] = s.scale;
    out[kShift * channels + c] = s.shift;
    out[kVar * channels + c] = static_cast<S>(count > 1.0 ? m2 / (count - 1.0) : var);
  }
}

}  // namespace
}  // namespace fused_res::cpu
