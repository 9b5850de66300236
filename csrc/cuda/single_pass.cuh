// Single-pass batch norm kernels (single_pass.h): staging in shared memory, grid barrier, merge and apply.
#pragma once

#include "cuda/batch_norm_device.cuh"
#include "cuda/ptx.cuh"
#include "cuda/single_pass.h"

namespace fused_res::cuda {

// Source of the elements in shared memory: a thread's elements of one work unit, in the order of its steps.
// No other thread reads them.
template <class T, int n>
struct SharedSource {
  const Vector<T, n>* staged;

  template <Layout layout>
  __device__ Vector<T, n> operator()(const TileIterator<layout, n>&, int64_t step) const {
    return staged[step * kThreads + threadIdx.x];
  }
};

// Start copying a work unit's elements to shared memory, zeros outside of the tensor.
template <class T, Layout layout, int n>
__device__ void stage(Vector<T, n>* staged, const void* data, const WorkPartition& partition,
                      const WorkUnit& unit) {
  const T* from = static_cast<const T*>(data);
  const int64_t first = unit.first_tile(partition) * kStepsPerTile,
                last = unit.last_tile(partition) * kStepsPerTile;
  TileIterator<layout, n> iterator(partition, unit.channel_block, first);
  for (int64_t step = first; step < last; ++step, iterator.next()) {
    Vector<T, n>* to = staged + (step - first) * kThreads + threadIdx.x;
    if constexpr (sizeof(Vector<T, n>) == 16) {
      ptx::cp_async(shared_address(to), iterator.valid() ? from + iterator.offset() : from, iterator.valid());
    } else {
      *to = load<n>(from + iterator.offset(), iterator.valid());
    }
  }
}

// Shared memory layout: the per-channel rows, the reduction scratch, then the staged elements.
constexpr int kSinglePassReductionBytes = 3 * kQuads * kMaxBlockChannels * sizeof(double);
static_assert(kSinglePassReductionBytes >= kBlockSumBytes<double>);
template <class A>
constexpr int kSinglePassScratch = kChannelBytes<A> + kSinglePassReductionBytes;

// Number of channels per threadblock in reduce_parts and merge_moments.
template <Layout layout>
constexpr int kMergeChannelsOf = layout == Layout::kNhwc ? kMaxBlockChannels : 8;

// Return the channel of a work unit whose parts this thread helps to merge. Surplus threads repeat the first
// channel.
template <Layout layout>
__device__ inline int64_t merged_channel(const WorkPartition& partition, const WorkUnit& unit) {
  const int own = threadIdx.x % kMergeChannelsOf<layout>;
  const int64_t first = unit.first_channel(partition);
  return own < partition.block_channels && first + own < partition.channels ? first + own : first;
}

// Whether this thread writes the results of a channel, the one at its index in the channel block.
__device__ inline bool owns_channel(const WorkPartition& partition, const WorkUnit& unit) {
  const int own = static_cast<int>(threadIdx.x);
  return own < partition.block_channels && unit.first_channel(partition) + own < partition.channels;
}

// A threadblock's work units of one slice. They are consecutive, so that few of them differ in their channel
// block.
struct WorkUnitRange {
  int64_t first_block, first, count, parts;

  __device__ WorkUnitRange(const WorkPartition& partition, const SinglePassConfig& config,
                           int64_t first_block)
      : first_block(first_block), first(blockIdx.x * config.units_per_block), parts(partition.parts) {
    const int64_t left = partition.channel_blocks - first_block;
    const int64_t units = (left < config.blocks_per_slice ? left : config.blocks_per_slice) * parts - first;
    count = units < config.units_per_block ? units : config.units_per_block;
  }
  __device__ WorkUnit unit(int64_t i) const {
    return {first_block + (first + i) / parts, (first + i) % parts};
  }
  __device__ bool begins_channel_block(int64_t i) const { return i == 0 || unit(i).part == 0; }
};

// Forward: stage x, compute the partial statistics, meet at the grid barrier, merge the statistics and apply.
template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
single_pass_forward_kernel(const __grid_constant__ SinglePassForwardArgs args) {
  using A = Accumulator<T>;
  const WorkPartition& partition = args.apply.partition;
  A* rows = reinterpret_cast<A*>(shared_memory());
  A* room = channel_row(rows, 2, 0);
  auto* staged = reinterpret_cast<Vector<T, n>*>(shared_memory() + kSinglePassScratch<A>);
  const int64_t stride = partition.tiles_per_part * kStepsPerTile * kThreads;
  unsigned arrivals = 0;
  for (int64_t block = 0; block < partition.channel_blocks; block += args.config.blocks_per_slice) {
    const WorkUnitRange range(partition, args.config, block);
    for (int64_t i = 0; i < range.count; ++i)
      stage<T, layout, n>(staged + i * stride, args.apply.x, partition, range.unit(i));
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    for (int64_t i = 0; i < range.count; ++i) {
      unit_partials<T, layout, n>(partition, range.unit(i), SharedSource<T, n>{staged + i * stride},
                                  args.partials, room);
    }
    ptx::grid_barrier(args.counter, arrivals += gridDim.x);
    for (int64_t i = 0; i < range.count; ++i) {
      const WorkUnit unit = range.unit(i);
      if (range.begins_channel_block(i)) {
        __syncthreads();  // the rows of the block before have been read
        const int64_t channel = merged_channel<layout>(partition, unit);
        const MergedMoments merged = merge_moments<kMergeChannelsOf<layout>>(
            static_cast<const A*>(args.partials), 4, partition.channels, channel, {0, partition.parts},
            reinterpret_cast<double*>(room));
        if (owns_channel(partition, unit)) {
          const ChannelStats<A> norm = batch_stats<A>(merged, args.merge, channel);
          const int position = channel_position<A>(partition);
          channel_row(rows, 0, kRowMean)[position] = norm.mean;
          channel_row(rows, 0, kRowScale)[position] = norm.scale;
          channel_row(rows, 0, kRowShift)[position] = norm.shift;
          if (unit.part == 0)
            write_stats(static_cast<A*>(args.merge.stats), partition.channels, channel, norm,
                        static_cast<A>(unbiased_variance(merged)));
        }
        if (args.apply.residual_stats != nullptr)
          fill_norm(rows, 1, args.apply.residual_stats, partition, unit);
        __syncthreads();
      }
      unit_apply<T, layout, n, 2>(args.apply, unit, SharedSource<T, n>{staged + i * stride}, rows);
    }
  }
}

// Backward: stage dy and x, compute the partial sums, meet at the grid barrier, reduce the sums and compute
// dx.
template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
single_pass_backward_kernel(const __grid_constant__ SinglePassBackwardArgs args) {
  using A = Accumulator<T>;
  const BackwardArgs& backward = args.backward;
  const WorkPartition& partition = backward.partition;
  A* rows = reinterpret_cast<A*>(shared_memory());
  A* room = channel_row(rows, 2, 0);
  auto* staged = reinterpret_cast<Vector<T, n>*>(shared_memory() + kSinglePassScratch<A>);
  const int64_t stride = partition.tiles_per_part * kStepsPerTile * kThreads;  // of dy; then as much of x
  unsigned arrivals = 0;
  for (int64_t block = 0; block < partition.channel_blocks; block += args.config.blocks_per_slice) {
    const WorkUnitRange range(partition, args.config, block);
    for (int64_t i = 0; i < range.count; ++i) {
      stage<T, layout, n>(staged + 2 * i * stride, backward.dy, partition, range.unit(i));
      stage<T, layout, n>(staged + (2 * i + 1) * stride, backward.x, partition, range.unit(i));
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    for (int64_t i = 0; i < range.count; ++i) {
      const WorkUnit unit = range.unit(i);
      if (range.begins_channel_block(i)) {
        __syncthreads();
        fill_backward_norms(rows, backward, unit);
        __syncthreads();
      }
      const SharedSource<T, n> dy{staged + 2 * i * stride}, x{staged + (2 * i + 1) * stride};
      unit_sums<T, layout, n, 1>(backward, unit, dy, x, rows, room);
    }
    ptx::grid_barrier(args.counter, arrivals += gridDim.x);
    for (int64_t i = 0; i < range.count; ++i) {
      const WorkUnit unit = range.unit(i);
      if (range.begins_channel_block(i)) {
        __syncthreads();
        const int64_t channel = merged_channel<layout>(partition, unit);
        const A* partials = static_cast<const A*>(backward.partials) + channel;
        const int64_t channels = partition.channels, row_count = backward.sums_rows;
        const auto sums = reduce_parts<kMergeChannelsOf<layout>, 3>(
            {0, partition.parts}, reinterpret_cast<double*>(room), [=](int64_t part) {
              const A* of_part = partials + part * row_count * channels;
              return SumVector<3>{
                  {of_part[0], of_part[channels], row_count == 3 ? of_part[2 * channels] : A(0)}};
            });
        fill_backward_norms(rows, backward, unit);
        if (owns_channel(partition, unit)) {
          const A dy = static_cast<A>(sums.values[0]), dyx = static_cast<A>(sums.values[1]),
                  dyr = static_cast<A>(sums.values[2]);
          if (unit.part == 0) {
            store_parameter_grads(args.grads, 0, channel, dy);
            store_parameter_grads(args.grads, 1, channel, dyx);
            store_parameter_grads(args.grads, 2, channel, dyr);
          }
          if (backward.training) fill_backward_means(rows, 0, dy, dyx, backward.stats, backward, channel);
          if (backward.residual_training)
            fill_backward_means(rows, 1, dy, dyr, backward.residual_stats, backward, channel);
        }
        __syncthreads();
      }
      const SharedSource<T, n> dy{staged + 2 * i * stride}, x{staged + (2 * i + 1) * stride};
      unit_dx<T, layout, n, 1>(backward, unit, dy, x, rows);
    }
  }
}

}  // namespace fused_res::cuda
