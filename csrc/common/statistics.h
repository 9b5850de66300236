// The maths of batch statistics, one channel at a time: plain functions that the CPU kernels and the CUDA
// kernels share.
//
// A partial result is (count, mean, M2) with M2 = sum (x - mean)^2. Partials are merged pairwise in a fixed
// order, never as E[x^2] - E[x]^2: at mean 100 and deviation 1 that loses all but three digits in float32.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RES_INLINE static inline __host__ __device__
#else
// `static`: these are compiled for several instruction sets, and must not be merged across them by the
// linker.
#define FUSED_RES_INLINE static inline
#endif

namespace fused_res {

struct Moments {
  double mean;
  double m2;
};

// What is needed to merge `count_b` values into `count_a` values. The counts are those of all channels, so
// the division is done once, not in every channel.
struct MergeFactors {
  double mean;  // count_b / (count_a + count_b)
  double m2;    // count_a * count_b / (count_a + count_b)
};

FUSED_RES_INLINE MergeFactors merge_factors(double count_a, double count_b) {
  const double share = count_b / (count_a + count_b);
  return {share, count_a * share};
}

// Chan's update. Equal means stay exactly as they are, so a constant channel has variance 0. Where a mean is
// infinite or NaN the difference would make all of it NaN; the sum does what a sum over the values would do.
FUSED_RES_INLINE Moments merge(Moments a, Moments b, MergeFactors factors) {
  const double delta = b.mean - a.mean;
  const bool finite = delta - delta == 0.0;
  return {finite ? a.mean + delta * factors.mean : a.mean + b.mean, a.m2 + b.m2 + delta * delta * factors.m2};
}

// Moments from sums of d = x - origin. Harmless only if the origin lies near the mean, in units of the
// deviation.
FUSED_RES_INLINE Moments moments_from_sums(double origin, double sum, double sum_of_squares, double count) {
  const double shift = sum / count;
  const double m2 = sum_of_squares - sum * shift;
  return {origin + shift, m2 < 0.0 ? 0.0 : m2};  // NaN stays
}

template <class T>  // float or double
struct ChannelStats {
  T mean, invstd, scale, shift;
};

// The normalised value is (x - mean) * scale + shift. What rounding the mean took away would come back in
// every element, times scale; the shift makes up for it.
template <class T>
FUSED_RES_INLINE ChannelStats<T> channel_stats(double mean, double invstd, double weight, double bias) {
  const T rounded = static_cast<T>(mean);
  const double scale = weight * invstd, lost = static_cast<double>(rounded) - mean;
  return {rounded, static_cast<T>(invstd), static_cast<T>(scale), static_cast<T>(bias + lost * scale)};
}

// Training: dx = scale * (dy - mean(dy) - xhat * mean(dy * xhat)) = scale * dy + slope * (x - mean) + offset.
// Not folded into slope * x + offset': where the deviation is small against the mean, that loses what x -
// mean keeps.
template <class T>
struct GradientFactors {
  T slope, offset;
};

template <class T>
FUSED_RES_INLINE GradientFactors<T> gradient_factors(double sum_dy, double sum_dy_xmu, double count,
                                                     double invstd, double scale) {
  return {static_cast<T>(-scale * invstd * invstd * sum_dy_xmu / count),
          static_cast<T>(-scale * sum_dy / count)};
}

}  // namespace fused_res
