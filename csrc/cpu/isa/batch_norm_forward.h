// Batch norm (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167) + residual add + activation, forward: batch
// statistics, with a kernel for each layout, and the elementwise pass, written once for both.
#pragma once

#include "common/normalize.h"
#include "cpu/isa/activation.h"
#include "cpu/isa/batch_norm_sums.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// --- statistics ---

// A chunk's mean and M2 are computed from sums of x - pivot and (x - pivot)^2 (shifted data). The pivot is
// estimated from the first rows (NHWC) or vectors (NCHW) of the chunk, the pilot sample. With n values in the
// chunk and k in the pilot sample, cancellation leaves M2 a relative error of about (1 + n / k) eps if the
// sample is an outlier, else near 1 eps. The pivot is the median of the means of three parts of the sample,
// so that a single outlying value does not make it an outlier.
constexpr int kPilot = 15;

constexpr int64_t pilot_parts(int64_t pilot) { return pilot < 3 ? 1 : 3; }

template <class S>
inline S median(const S (&values)[3]) {
  const S low = values[0] < values[1] ? values[0] : values[1],
          high = values[0] < values[1] ? values[1] : values[0];
  return values[2] < low ? low : (values[2] < high ? values[2] : high);
}

// The pivot has to be finite: x - infinity would turn infinity into NaN everywhere.
template <class S>
inline S finite_or_zero(S pivot) {
  return pivot - pivot == S(0) ? pivot : S(0);
}

// True if M2 = sum of squares - sum^2 / count loses accuracy to cancellation: the pivot is more than two
// deviations from the mean, for example where an image begins with a black border. Measured in one chunk of a
// thousand for a ResNet on smooth images.
inline bool has_cancellation(double sum, double squares, double count) {
  return sum * sum > 0.8 * count * squares;
}

// Second pass after a cancellation: the moments with the mean itself as the pivot, in double, over `n` values
// of each image.
template <class T>
Moments moments_about(double pivot, const T* first, int64_t images, int64_t image, int64_t n,
                      int64_t stride) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      const double d = static_cast<double>(load_scalar(first + i * image + k * stride)) - pivot;
      sum += d, squares += d * d;
    }
  }
  return moments_from_sums(pivot, sum, squares, static_cast<double>(images * n));
}

template <class T>
void moments_nhwc(const Block& b, const void* x, double* partial) {
  using S = Compute<T>;
  using V = Vec<S>;
  const int64_t rows = b.n1 - b.n0, pilot = min(rows, kPilot);
  const int64_t parts = pilot_parts(pilot), part_rows = pilot / parts;
  for (int64_t c0 = b.c0; c0 < b.c1; c0 += kStackChannels) {
    const int64_t width = min(kStackChannels, b.c1 - c0);
    const T* first = static_cast<const T*>(x) + b.n0 * b.channels + c0;
    alignas(64) S pivot[kStackChannels];
    double sums[2][kStackChannels];
    const auto sum_shifted = [&](const T* from, int64_t n) {
      const auto shifted = [&](auto part, int64_t row, int64_t c) {
        const V d = part.load(from + row * b.channels + c) - load(pivot + c);
        return Term<V, 1>{d, {d}};
      };
      sum_rows<V>(n, width, b.channels, sums, shifted, from);
    };
    for (int64_t c = 0; c < width; ++c) pivot[c] = load_scalar(first + c);
    S means[kStackChannels][3];
    for (int64_t i = 0; i < 3; ++i) {
      if (i < parts) sum_shifted(first + i * part_rows * b.channels, part_rows);
      for (int64_t c = 0; c < width; ++c)
        means[c][i] = static_cast<S>(sums[0][c]) / static_cast<S>(part_rows);
    }
    for (int64_t c = 0; c < width; ++c) pivot[c] = finite_or_zero(pivot[c] + median(means[c]));
    sum_shifted(first, rows);
    for (int64_t c = 0; c < width; ++c) {
      const auto count = static_cast<double>(rows);
      Moments m = moments_from_sums(pivot[c], sums[0][c], sums[1][c], count);
      if (has_cancellation(sums[0][c], sums[1][c], count))
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
  const int64_t length = b.s1 - b.s0, pilot = min(length, kPilot * V::lanes);
  const int64_t parts = pilot_parts(pilot), part_length = pilot / parts;
  for (int64_t c = b.c0; c < b.c1; ++c) {
    const T* first = static_cast<const T*>(x) + c * b.spatial + b.s0;
    const int64_t image = b.channels * b.spatial;

    const T* pilot_plane = first + b.n0 * image;
    const S start = load_scalar(pilot_plane);
    S means[3];
    for (int64_t i = 0; i < 3; ++i) {
      V sum = V::zero();
      for_each_vector<V>(part_length, [&](auto part, int64_t k) {
        sum =
            sum + part.zero_tail(part.load(pilot_plane + i % parts * part_length + k) - V::broadcast(start));
      });
      means[i] = reduce_add(sum) / static_cast<S>(part_length);
    }
    const V pivot = V::broadcast(finite_or_zero(start + median(means)));

    PlaneSums<V, 2> plane_sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      plane_sums.add(length, [&](auto part, int64_t i) {
        const V d = part.zero_tail(part.load(first + n * image + i) - pivot);
        return Term<V, 1>{d, {d}};
      });
    }
    double sums[2];
    plane_sums.reduce(sums, 1);
    const auto count = static_cast<double>((b.n1 - b.n0) * length);
    Moments m = moments_from_sums(first_lane(pivot), sums[0], sums[1], count);
    if (has_cancellation(sums[0], sums[1], count))
      m = moments_about(m.mean, first + b.n0 * image, b.n1 - b.n0, image, length, 1);
    partial[c] = m.mean;
    partial[b.channels + c] = m.m2;
  }
}

// --- normalize, add, activation ---

// One norm along a contiguous segment.
template <Layout L, class S>
struct Norm {
  using Param = typename ChannelParam<L, S>::type;
  Param mean, scale, shift;

  Norm(const NormArgs& a, int64_t channel)
      : mean{static_cast<const S*>(a.mean) + channel},
        scale{static_cast<const S*>(a.scale) + channel},
        shift{static_cast<const S*>(a.shift) + channel} {}

  template <class Part>
  Vec<S> centered(Part part, Vec<S> v, int64_t i) const {
    return v - mean.at(part, i);
  }
  template <class Part>
  Vec<S> operator()(Part part, Vec<S> v, int64_t i) const {
    return normalize(centered(part, v, i), scale.at(part, i), shift.at(part, i));
  }
};

template <class T, Layout L, bool kPair>
void forward(const Block& b, const ForwardArgs& a) {
  using S = Compute<T>;
  using V = Vec<S>;
  const bool relu = a.activation == Activation::kRelu, stream = a.stream;
  for_each_contiguous<L>(b, [&](int64_t start, int64_t mask_start, int64_t channel, int64_t n) {
    const Norm<L, S> norm(a.norm, channel);
    // Only used in a pair; without one it needs a valid pointer.
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
      if (relu) v = maskz(active, v);
      store_or_stream(part, y + i, v, stream);
    });
  });
  if (stream) stream_fence();
}

// The activations that need neither a residual nor a mask.
template <class T, Layout L, Activation kActivation>
void forward_activation(const Block& b, const ForwardArgs& a) {
  using S = Compute<T>;
  using V = Vec<S>;
  const bool stream = a.stream;
  const V negative_slope = V::broadcast(static_cast<S>(a.negative_slope));
  for_each_contiguous<L>(b, [&](int64_t start, int64_t, int64_t channel, int64_t n) {
    const Norm<L, S> norm(a.norm, channel);
    const T* x = static_cast<const T*>(a.x) + start;
    T* y = static_cast<T*>(a.y) + start;
    for_each_vector<V>(n, [&](auto part, int64_t i) {
      const V v = activate<kActivation>(norm(part, part.load(x + i), i), negative_slope);
      store_or_stream(part, y + i, v, stream);
    });
  });
  if (stream) stream_fence();
}

template <class T, Layout L>
void forward(const Block& b, const ForwardArgs& a) {
  switch (a.activation) {
    case Activation::kRelu6:
      return forward_activation<T, L, Activation::kRelu6>(b, a);
    case Activation::kLeakyRelu:
      return forward_activation<T, L, Activation::kLeakyRelu>(b, a);
    case Activation::kSilu:
      return forward_activation<T, L, Activation::kSilu>(b, a);
    case Activation::kIdentity:
    case Activation::kRelu:
      break;
  }
  if (a.residual_norm.mean) return forward<T, L, true>(b, a);
  forward<T, L, false>(b, a);
}

// --- between the two passes, per channel ---

// The rows of the stats tensor from mean and M2 (cuDNN's BN_FINALIZE).

template <class S>
void finalize_stats(void* stats, const double* moments, double count, const AffineArgs& params,
                    int64_t channels, int64_t c0, int64_t c1) {
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
