// Arithmetic of batch statistics, one channel at a time: functions that the CPU and CUDA kernels share.
//
// Partial statistics are (count, mean, M2) with M2 = sum (x - mean)^2. They are merged pairwise in a fixed
// order (Chan, Golub & LeVeque 1979). E[x^2] - E[x]^2 is never used: at mean 100 and standard deviation 1 it
// loses all but three digits in float32.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RES_INLINE static inline __host__ __device__
#else
// `static`, because these functions are compiled for several instruction sets, whose versions the linker must
// not merge.
#define FUSED_RES_INLINE static inline
#endif

namespace fused_res {

struct Moments {
  double mean;
  double m2;
};

// Factors for merging the statistics of `count_b` values into those of `count_a` values. All channels have
// the same counts, so the division is done once and not per channel.
struct MergeFactors {
  double mean;  // count_b / (count_a + count_b)
  double m2;    // count_a * count_b / (count_a + count_b)
};

FUSED_RES_INLINE MergeFactors merge_factors(double count_a, double count_b) {
  const double share = count_b / (count_a + count_b);
  return {share, count_a * share};
}

// Chan's merge. If the means are equal, the result is exactly that mean, so a constant channel has variance
// 0. If a mean is infinite, inf - inf would give NaN even if the mean over all values is infinite; the means
// are added instead.
FUSED_RES_INLINE Moments merge(Moments a, Moments b, MergeFactors factors) {
  const double delta = b.mean - a.mean;
  const bool finite = delta - delta == 0.0;
  return {finite ? a.mean + delta * factors.mean : a.mean + b.mean, a.m2 + b.m2 + delta * delta * factors.m2};
}

// Moments from the sums of d = x - pivot and d^2. Accurate only if the pivot is within a few standard
// deviations of the mean.
FUSED_RES_INLINE Moments moments_from_sums(double pivot, double sum, double sum_of_squares, double count) {
  const double shift = sum / count;
  const double m2 = sum_of_squares - sum * shift;
  return {pivot + shift, m2 < 0.0 ? 0.0 : m2};  // NaN propagates
}

template <class T>  // float or double
struct ChannelStats {
  T mean, invstd, scale, shift;
};

// The normalized value is (x - mean) * scale + shift. Rounding the mean to T would add the same error, times
// scale, to every element; the shift compensates for it.
template <class T>
FUSED_RES_INLINE ChannelStats<T> channel_stats(double mean, double invstd, double weight, double bias) {
  const T rounded = static_cast<T>(mean);
  const double scale = weight * invstd, rounding_error = static_cast<double>(rounded) - mean;
  return {rounded, static_cast<T>(invstd), static_cast<T>(scale),
          static_cast<T>(bias + rounding_error * scale)};
}

// Training: dx = scale * (dy - mean(dy) - xhat * mean(dy * xhat)) = scale * dy + slope * (x - mean) + offset.
// Not folded into slope * x + offset', which loses accuracy if the standard deviation is small compared
// with the mean.
template <class T>
struct BackwardCoefficients {
  T slope, offset;
};

template <class T>
FUSED_RES_INLINE BackwardCoefficients<T> backward_coefficients(double sum_dy, double sum_dy_xmu, double count,
                                                               double invstd, double scale) {
  return {static_cast<T>(-scale * invstd * invstd * sum_dy_xmu / count),
          static_cast<T>(-scale * sum_dy / count)};
}

}  // namespace fused_res
