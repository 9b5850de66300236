// Second stage of the reductions: merges the partial statistics or partial sums of all parts, in float64 and
// in an order that depends on the number of parts alone. Variances are merged as in Chan, Golub and LeVeque
// 1979.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/tile_iterator.cuh"

namespace fused_res::cuda {

// Order of the summation: virtual lane l adds the parts l, l + kLanes, ... of the range. The sums of four
// consecutive lanes (a quad) are then added pairwise, and the sums of the quads one after the other.
constexpr int kLanes = 32, kQuads = kLanes / 4;

// Half-open range of parts.
struct PartRange {
  int64_t first, last;
};

// n values that are summed together.
template <int n>
struct SumVector {
  double values[n];
};

// Sum n values over a range of parts, for `channels_per_block` adjacent channels per threadblock: 8 or 64.
// With 8, a thread computes one lane, with 64, two times four, but the order of the additions is the same.
// values_of(part) returns the n values of a part for this thread's channel, threadIdx.x % channels_per_block.
// All threads of a channel receive the sums. `shared`: n * kQuads * channels_per_block values of scratch,
// reusable on return.
template <int channels_per_block, int n, class ValuesOf>
__device__ SumVector<n> reduce_parts(PartRange parts, double* shared, const ValuesOf& values_of) {
  constexpr int lanes_per_thread = kLanes * channels_per_block / kThreads,
                lanes = lanes_per_thread > 4 ? 4 : lanes_per_thread;
  constexpr int batch = lanes == 1 ? 8 : 1;
  constexpr int threads = kThreads / channels_per_block;  // per channel
  const int channel = threadIdx.x % channels_per_block;
  const auto quad_sum = [=](int value, int quad) {
    return shared + (value * kQuads + quad) * channels_per_block + channel;
  };
#pragma unroll 1  // unrolled, it would exceed the register budget
  for (int lane = threadIdx.x / channels_per_block * lanes; lane < kLanes; lane += threads * lanes) {
    double sums[lanes][n] = {};
    for (int64_t start = parts.first + lane; start < parts.last; start += kLanes * batch) {
#pragma unroll
      for (int b = 0; b < batch; ++b) {  // all loads are in flight before the first value is used
#pragma unroll
        for (int l = 0; l < lanes; ++l) {
          const int64_t part = start + b * kLanes + l;
          const bool valid = part < parts.last;
          const SumVector<n> more = values_of(valid ? part : parts.first);
          for (int q = 0; q < n; ++q) sums[l][q] += valid ? more.values[q] : 0.0;
        }
      }
    }
    for (int q = 0; q < n; ++q) {
      if constexpr (lanes == 1) {
        double sum = sums[0][q];
        for (int distance = channels_per_block; distance < kWarpSize; distance *= 2)
          sum += __shfl_xor_sync(~0u, sum, distance);
        if (threadIdx.x % kWarpSize < channels_per_block) *quad_sum(q, lane / 4) = sum;
      } else {
        *quad_sum(q, lane / 4) = (sums[0][q] + sums[1][q]) + (sums[2][q] + sums[3][q]);
      }
    }
  }
  __syncthreads();
  SumVector<n> total;
  for (int q = 0; q < n; ++q) {
    total.values[q] = *quad_sum(q, 0);
    for (int quad = 1; quad < kQuads; ++quad) total.values[q] += *quad_sum(q, quad);
  }
  __syncthreads();
  return total;
}

// Count, mean and sum of squared deviations of a channel.
struct MergedMoments {
  double count, mean, m2;
};

// Merge the partial statistics of many parts at once: the mean first, then the deviations from it (Chan,
// Golub and LeVeque's formula for the between-part sum of squares). P: dtype of the partials (parts, rows,
// C), with 3 or 4 rows: count, mean, M2 (sum of squared deviations) and optionally the compensation term of
// the mean.
template <int channels_per_block, class P>
__device__ MergedMoments merge_moments(const P* partials, int rows, int64_t channels, int64_t channel,
                                       PartRange parts, double* shared) {
  const auto partial = [=](int64_t part, int row) {
    return static_cast<double>(partials[(part * rows + row) * channels + channel]);
  };
  const auto mean_of = [=](int64_t part) {
    return rows == 4 ? partial(part, 1) + partial(part, 3) : partial(part, 1);
  };
  // The sum is taken around the first part's mean, so that it stays small. A part without values (a process
  // with an empty batch) has no mean, and possibly no part has values.
  const double pivot = partial(parts.first, 1);
  const auto sums = reduce_parts<channels_per_block, 3>(parts, shared, [=](int64_t part) {
    const double count = partial(part, 0), shift = mean_of(part) - pivot, m2 = partial(part, 2);
    return SumVector<3>{{count, count > 0 ? count * shift : 0.0, count > 0 ? m2 : 0.0}};
  });
  const double count = sums.values[0], mean = pivot + sums.values[1] / (count > 1 ? count : 1.0);
  const auto between_parts = reduce_parts<channels_per_block, 1>(parts, shared, [=](int64_t part) {
    const double n = partial(part, 0), shift = mean_of(part) - mean;
    return SumVector<1>{{n > 0 ? n * shift * shift : 0.0}};
  });
  return {count, mean, sums.values[2] + between_parts.values[0]};
}

// The rows of `stats`, see fused_res/ops/schemas.py.
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

// Return mean, invstd, scale and shift of a channel from its merged moments and the norm's parameters.
template <class A>
__device__ inline ChannelStats<A> batch_stats(const MergedMoments& merged, const MergeArgs& args,
                                              int64_t channel) {
  const double var = merged.m2 / (merged.count > 1 ? merged.count : 1.0);
  return channel_stats<A>(merged.mean, 1.0 / sqrt(var + args.eps), load_parameter(args.weight, channel, 1.0),
                          load_parameter(args.bias, channel, 0.0));
}

// Return the unbiased variance, which the running statistics are updated with.
__device__ inline double unbiased_variance(const MergedMoments& merged) {
  return merged.m2 / (merged.count > 2 ? merged.count - 1 : 1.0);
}

constexpr int kMergeChannels = 8;
constexpr int kMergeSharedBytes = 3 * kQuads * kMergeChannels * sizeof(double);

// Merge groups of parts, 8 channels of one group per threadblock. P: dtype of the partials. A: dtype of
// `stats`, which are computed from a single group; without them, each group becomes one part of three rows of
// float64.
template <class P, class A>
FUSED_RES_KERNEL(kThreads, 2)
merge_kernel(const __grid_constant__ MergeArgs args) {
  const int64_t blocks = (args.channels + kMergeChannels - 1) / kMergeChannels, group = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t first = group * args.parts_per_group, last = first + args.parts_per_group;
  const bool valid = channel < args.channels;
  const MergedMoments merged = merge_moments<kMergeChannels>(
      static_cast<const P*>(args.partials), args.rows, args.channels, valid ? channel : args.channels - 1,
      {first, last < args.parts ? last : args.parts}, reinterpret_cast<double*>(shared_memory()));
  if (!valid || threadIdx.x >= kMergeChannels) return;
  if (args.stats != nullptr) {
    write_stats(static_cast<A*>(args.stats), args.channels, channel, batch_stats<A>(merged, args, channel),
                static_cast<A>(unbiased_variance(merged)));
    return;
  }
  double* out = args.merged + group * 3 * args.channels + channel;
  out[0] = merged.count;
  out[args.channels] = merged.mean;
  out[2 * args.channels] = merged.m2;
}

// Store a channel's value of a row of the backward sums to the parameter gradients that equal this row.
template <class A>
__device__ inline void store_parameter_grads(const ParameterGrads& grads, int row, int64_t channel, A sum) {
  const auto store_to = [=](const ParameterGrad& grad) {
    if (grad.data != nullptr) store_parameter(grad.data, grad.dtype, channel, sum);
  };
  if (row == 0) {
    store_to(grads.bias);
    store_to(grads.residual_bias);
  } else {
    store_to(row == 1 ? grads.weight : grads.residual_weight);
  }
}

// Sum groups of parts, 8 columns of one group per threadblock.
template <class A>
FUSED_RES_KERNEL(kThreads, 2)
sum_partials_kernel(const __grid_constant__ SumPartialsArgs args) {
  const int64_t blocks = (args.width + kMergeChannels - 1) / kMergeChannels, group = blockIdx.x / blocks;
  const int64_t col = blockIdx.x % blocks * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t first = group * args.parts_per_group, last = first + args.parts_per_group;
  const bool valid = col < args.width;
  const A* partials = static_cast<const A*>(args.partials) + (valid ? col : args.width - 1);
  const int64_t width = args.width;
  const auto total = reduce_parts<kMergeChannels, 1>(
      {first, last < args.parts ? last : args.parts}, reinterpret_cast<double*>(shared_memory()),
      [=](int64_t part) { return SumVector<1>{{static_cast<double>(partials[part * width])}}; });
  if (!valid || threadIdx.x >= kMergeChannels) return;
  const A sum = static_cast<A>(total.values[0]);
  static_cast<A*>(args.sums)[group * width + col] = sum;
  const int row = col < args.channels ? 0 : col < 2 * args.channels ? 1 : 2;
  store_parameter_grads(args.grads, row, col - row * args.channels, sum);
}

}  // namespace fused_res::cuda
