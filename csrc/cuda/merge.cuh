// Stage two of the reductions: what the parts found is merged, in double and in an order that depends on
// nothing but the number of parts.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/walk.cuh"

namespace fused_res::cuda {

// Parts that are added up beside each other. Lane l takes the parts l, l + kLanes, ... of a group; then four
// lanes at a time, pairwise, and these sums one after the other.
constexpr int kLanes = 32, kQuads = kLanes / 4;

struct Parts {
  int64_t first, last;
};

template <int quantities>
struct Quantities {
  double values[quantities];
};

// For `at_once` channels beside each other, 8 or 64 so that the few threads of a channel take one lane or two
// times four, but all in the same order. terms(part) are the numbers to add up for this thread's channel,
// threadIdx.x % at_once; all threads of a channel receive the sums. `shared`: quantities * kQuads * at_once,
// free again behind it.
template <int at_once, int quantities, class Terms>
__device__ Quantities<quantities> sum_parts(Parts parts, double* shared, const Terms& terms) {
  constexpr int each = kLanes * at_once / kThreads, lanes = each > 4 ? 4 : each;
  constexpr int batch = lanes == 1 ? 8 : 1;
  constexpr int threads = kThreads / at_once;  // of a channel
  const int channel = threadIdx.x % at_once;
  const auto at = [=](int quantity, int quad) {
    return shared + (quantity * kQuads + quad) * at_once + channel;
  };
#pragma unroll 1  // at once they would take too many registers
  for (int lane = threadIdx.x / at_once * lanes; lane < kLanes; lane += threads * lanes) {
    double sums[lanes][quantities] = {};
    for (int64_t start = parts.first + lane; start < parts.last; start += kLanes * batch) {
#pragma unroll
      for (int b = 0; b < batch; ++b) {  // loads of all are under way before the first is used
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          const int64_t part = start + b * kLanes + l;
          const bool inside = part < parts.last;
          const Quantities<quantities> more = terms(inside ? part : parts.first);
          for (int q = 0; q < quantities; ++q) sums[l][q] += inside ? more.values[q] : 0.0;
        }
      }
    }
    for (int q = 0; q < quantities; ++q) {
      if constexpr (lanes == 1) {
        double sum = sums[0][q];
        for (int distance = at_once; distance < kWarp; distance *= 2)
          sum += __shfl_xor_sync(~0u, sum, distance);
        if (threadIdx.x % kWarp < at_once) *at(q, lane / 4) = sum;
      } else {
        *at(q, lane / 4) = (sums[0][q] + sums[1][q]) + (sums[2][q] + sums[3][q]);
      }
    }
  }
  __syncthreads();
  Quantities<quantities> total;
  for (int q = 0; q < quantities; ++q) {
    total.values[q] = *at(q, 0);
    for (int quad = 1; quad < kQuads; ++quad) total.values[q] += *at(q, quad);
  }
  __syncthreads();
  return total;
}

struct Merged {
  double count, mean, m2;
};

// Chan's rule for many parts at once: the mean first, then the deviations from it. P: what the partials are
// kept in, `rows` (3 or 4) of them: count, mean, sum of squared deviations and, if there is a fourth, what
// rounding took from the mean.
template <int at_once, class P>
__device__ Merged merge_moments(const P* partials, int rows, int64_t channels, int64_t channel, Parts parts,
                                double* shared) {
  const auto number = [=](int64_t part, int row) {
    return static_cast<double>(partials[(part * rows + row) * channels + channel]);
  };
  const auto mean_of = [=](int64_t part) {
    return rows == 4 ? number(part, 1) + number(part, 3) : number(part, 1);
  };
  // Around the first mean, so that the sum stays small. A part without values (a process with an empty batch)
  // has no mean; all of them together may have none.
  const double pivot = number(parts.first, 1);
  const auto sums = sum_parts<at_once, 3>(parts, shared, [=](int64_t part) {
    const double count = number(part, 0), off = mean_of(part) - pivot, m2 = number(part, 2);
    return Quantities<3>{{count, count > 0 ? count * off : 0.0, count > 0 ? m2 : 0.0}};
  });
  const double count = sums.values[0], mean = pivot + sums.values[1] / (count > 1 ? count : 1.0);
  const auto between = sum_parts<at_once, 1>(parts, shared, [=](int64_t part) {
    const double n = number(part, 0), off = mean_of(part) - mean;
    return Quantities<1>{{n > 0 ? n * off * off : 0.0}};
  });
  return {count, mean, sums.values[2] + between.values[0]};
}

// The rows of `stats`, see fused_res/ops.py.
enum StatsRow { kMean, kInvstd, kScale, kShift, kVar, kStatsRows };

template <class A>
__device__ inline void write_stats(A* stats, int64_t channels, int64_t channel, const ChannelStats<A>& norm,
                                   A var) {
  stats[kMean * channels + channel] = norm.mean;
  stats[kInvstd * channels + channel] = norm.invstd;
  stats[kScale * channels + channel] = norm.scale;
  stats[kShift * channels + channel] = norm.shift;
  stats[kVar * channels + channel] = var;
}

template <class A>
__device__ inline ChannelStats<A> batch_stats(const Merged& merged, const MergeArgs& args, int64_t channel) {
  const double var = merged.m2 / (merged.count > 1 ? merged.count : 1.0);
  return channel_stats<A>(merged.mean, 1.0 / sqrt(var + args.eps), load_parameter(args.weight, channel, 1.0),
                          load_parameter(args.bias, channel, 0.0));
}

// As running statistics take it in.
__device__ inline double unbiased(const Merged& merged) {
  return merged.m2 / (merged.count > 2 ? merged.count - 1 : 1.0);
}

constexpr int kMergedAtOnce = 8;
constexpr int kMergeShared = 3 * kQuads * kMergedAtOnce * sizeof(double);

// A: what `stats` are kept in; where there are none, every group becomes three rows of double.
template <class P, class A>
FUSED_RES_KERNEL(kThreads, 2)
merge_kernel(const __grid_constant__ MergeArgs args) {
  const int64_t blocks = (args.channels + kMergedAtOnce - 1) / kMergedAtOnce, group = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * kMergedAtOnce + threadIdx.x % kMergedAtOnce;
  const int64_t first = group * args.parts_per_group, last = first + args.parts_per_group;
  const bool exists = channel < args.channels;
  const Merged merged = merge_moments<kMergedAtOnce>(
      static_cast<const P*>(args.partials), args.rows, args.channels, exists ? channel : args.channels - 1,
      {first, last < args.parts ? last : args.parts}, reinterpret_cast<double*>(shared_memory()));
  if (!exists || threadIdx.x >= kMergedAtOnce) return;
  if (args.stats != nullptr) {
    write_stats(static_cast<A*>(args.stats), args.channels, channel, batch_stats<A>(merged, args, channel),
                static_cast<A>(unbiased(merged)));
    return;
  }
  double* out = args.merged + group * 3 * args.channels + channel;
  out[0] = merged.count;
  out[args.channels] = merged.mean;
  out[2 * args.channels] = merged.m2;
}

template <class A>
FUSED_RES_KERNEL(kThreads, 2)
add_parts_kernel(const __grid_constant__ AddPartsArgs args) {
  const int64_t blocks = (args.width + kMergedAtOnce - 1) / kMergedAtOnce, group = blockIdx.x / blocks;
  const int64_t col = blockIdx.x % blocks * kMergedAtOnce + threadIdx.x % kMergedAtOnce;
  const int64_t first = group * args.parts_per_group, last = first + args.parts_per_group;
  const bool exists = col < args.width;
  const A* partials = static_cast<const A*>(args.partials) + (exists ? col : args.width - 1);
  const int64_t width = args.width;
  const auto total = sum_parts<kMergedAtOnce, 1>(
      {first, last < args.parts ? last : args.parts}, reinterpret_cast<double*>(shared_memory()),
      [=](int64_t part) { return Quantities<1>{{static_cast<double>(partials[part * width])}}; });
  if (exists && threadIdx.x < kMergedAtOnce)
    static_cast<A*>(args.sums)[group * width + col] = static_cast<A>(total.values[0]);
}

}  // namespace fused_res::cuda
