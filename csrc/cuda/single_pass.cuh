// The kernels of single_pass.h.
#pragma once

#include "cuda/batch_norm_units.cuh"
#include "cuda/ptx.cuh"
#include "cuda/single_pass.h"

namespace fused_res::cuda {

// A thread's elements of one unit, in the order of its steps: nobody else reads them.
template <class T, int n>
struct FromShared {
  const Vector<T, n>* staged;

  template <Layout layout>
  __device__ Vector<T, n> operator()(const Walk<layout, n>&, int64_t step) const {
    return staged[step * kThreads + threadIdx.x];
  }
};

// Begins to copy a unit's elements, zeros where there are none.
template <class T, Layout layout, int n>
__device__ void stage(Vector<T, n>* staged, const void* data, const Cut& cut, const Unit& unit) {
  const T* from = static_cast<const T*>(data);
  const int64_t first = unit.first_tile(cut) * kTile, last = unit.last_tile(cut) * kTile;
  Walk<layout, n> walk(cut, unit.block, first);
  for (int64_t step = first; step < last; ++step, walk.next()) {
    Vector<T, n>* to = staged + (step - first) * kThreads + threadIdx.x;
    if constexpr (sizeof(Vector<T, n>) == 16) {
      ptx::copy_async(shared_address(to), walk.inside() ? from + walk.offset() : from, walk.inside());
    } else {
      *to = load<n>(from + walk.offset(), walk.inside());
    }
  }
}

// What a thread block has in shared memory: rows of its channels, room to add up in, the staged elements.
constexpr int kSinglePassRoom = 3 * kQuads * kMostChannels * sizeof(double);
static_assert(kSinglePassRoom >= kBlockSumBytes<double>);
template <class A>
constexpr int kSinglePassScratch = kChannelBytes<A> + kSinglePassRoom;

// The channels whose parts are merged at once, see sum_parts.
template <Layout layout>
constexpr int kUnitAtOnce = layout == Layout::kNhwc ? kMostChannels : 8;

// The channel of a unit whose parts this thread helps to merge; threads too many do the first one's again.
template <Layout layout>
__device__ inline int64_t merged_channel(const Cut& cut, const Unit& unit) {
  const int own = threadIdx.x % kUnitAtOnce<layout>;
  const int64_t first = unit.first_channel(cut);
  return own < cut.block_channels && first + own < cut.channels ? first + own : first;
}

// Whether this thread is the one that writes that channel's results.
__device__ inline bool owns_channel(const Cut& cut, const Unit& unit) {
  const int own = static_cast<int>(threadIdx.x);
  return own < cut.block_channels && unit.first_channel(cut) + own < cut.channels;
}

// A thread block's units of one slice, neighbours, so that few of them differ in their block of channels.
struct Share {
  int64_t first_block, first, count, parts;

  __device__ Share(const Cut& cut, const SinglePassWork& work, int64_t first_block)
      : first_block(first_block), first(blockIdx.x * work.units_per_block), parts(cut.parts) {
    const int64_t left = cut.blocks - first_block;
    const int64_t units = (left < work.blocks_per_slice ? left : work.blocks_per_slice) * parts - first;
    count = units < work.units_per_block ? units : work.units_per_block;
  }
  __device__ Unit unit(int64_t i) const { return {first_block + (first + i) / parts, (first + i) % parts}; }
  __device__ bool begins_block(int64_t i) const { return i == 0 || unit(i).part == 0; }
};

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
single_pass_forward_kernel(const __grid_constant__ SinglePassForwardArgs args) {
  using A = Accumulator<T>;
  const Cut& cut = args.apply.cut;
  A* rows = reinterpret_cast<A*>(shared_memory());
  A* room = channel_row(rows, 2, 0);
  auto* staged = reinterpret_cast<Vector<T, n>*>(shared_memory() + kSinglePassScratch<A>);
  const int64_t stride = cut.tiles_per_part * kTile * kThreads;
  unsigned arrivals = 0;
  for (int64_t block = 0; block < cut.blocks; block += args.work.blocks_per_slice) {
    const Share share(cut, args.work, block);
    for (int64_t i = 0; i < share.count; ++i)
      stage<T, layout, n>(staged + i * stride, args.apply.x, cut, share.unit(i));
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    for (int64_t i = 0; i < share.count; ++i) {
      unit_partials<T, layout, n>(cut, share.unit(i), FromShared<T, n>{staged + i * stride}, args.partials,
                                  room);
    }
    ptx::grid_barrier(args.counter, arrivals += gridDim.x);
    for (int64_t i = 0; i < share.count; ++i) {
      const Unit unit = share.unit(i);
      if (share.begins_block(i)) {
        __syncthreads();  // the rows of the block before have been read
        const int64_t channel = merged_channel<layout>(cut, unit);
        const Merged merged =
            merge_moments<kUnitAtOnce<layout>>(static_cast<const A*>(args.partials), 4, cut.channels, channel,
                                               {0, cut.parts}, reinterpret_cast<double*>(room));
        if (owns_channel(cut, unit)) {
          const ChannelStats<A> norm = batch_stats<A>(merged, args.merge, channel);
          channel_row(rows, 0, kRowMean)[threadIdx.x] = norm.mean;
          channel_row(rows, 0, kRowScale)[threadIdx.x] = norm.scale;
          channel_row(rows, 0, kRowShift)[threadIdx.x] = norm.shift;
          if (unit.part == 0)
            write_stats(static_cast<A*>(args.merge.stats), cut.channels, channel, norm,
                        static_cast<A>(unbiased(merged)));
        }
        if (args.apply.residual_stats != nullptr) fill_norm(rows, 1, args.apply.residual_stats, cut, unit);
        __syncthreads();
      }
      unit_apply<T, layout, n, 2>(args.apply, unit, FromShared<T, n>{staged + i * stride}, rows);
    }
  }
}

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
single_pass_backward_kernel(const __grid_constant__ SinglePassBackwardArgs args) {
  using A = Accumulator<T>;
  const BackwardArgs& backward = args.backward;
  const Cut& cut = backward.cut;
  A* rows = reinterpret_cast<A*>(shared_memory());
  A* room = channel_row(rows, 2, 0);
  auto* staged = reinterpret_cast<Vector<T, n>*>(shared_memory() + kSinglePassScratch<A>);
  const int64_t stride = cut.tiles_per_part * kTile * kThreads;  // of dy; then as much of x
  unsigned arrivals = 0;
  for (int64_t block = 0; block < cut.blocks; block += args.work.blocks_per_slice) {
    const Share share(cut, args.work, block);
    for (int64_t i = 0; i < share.count; ++i) {
      stage<T, layout, n>(staged + 2 * i * stride, backward.dy, cut, share.unit(i));
      stage<T, layout, n>(staged + (2 * i + 1) * stride, backward.x, cut, share.unit(i));
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    for (int64_t i = 0; i < share.count; ++i) {
      const Unit unit = share.unit(i);
      if (share.begins_block(i)) {
        __syncthreads();
        fill_backward_norms(rows, backward, unit);
        __syncthreads();
      }
      const FromShared<T, n> dy{staged + 2 * i * stride}, x{staged + (2 * i + 1) * stride};
      unit_sums<T, layout, n, 1>(backward, unit, dy, x, rows, room);
    }
    ptx::grid_barrier(args.counter, arrivals += gridDim.x);
    for (int64_t i = 0; i < share.count; ++i) {
      const Unit unit = share.unit(i);
      if (share.begins_block(i)) {
        __syncthreads();
        const int64_t channel = merged_channel<layout>(cut, unit);
        const A* partials = static_cast<const A*>(backward.partials) + channel;
        const int64_t channels = cut.channels, row_count = backward.sums_rows;
        const auto sums = sum_parts<kUnitAtOnce<layout>, 3>(
            {0, cut.parts}, reinterpret_cast<double*>(room), [=](int64_t part) {
              const A* of_part = partials + part * row_count * channels;
              return Quantities<3>{
                  {of_part[0], of_part[channels], row_count == 3 ? of_part[2 * channels] : A(0)}};
            });
        fill_backward_norms(rows, backward, unit);
        if (owns_channel(cut, unit)) {
          const A dy = static_cast<A>(sums.values[0]), dyx = static_cast<A>(sums.values[1]),
                  dyr = static_cast<A>(sums.values[2]);
          if (unit.part == 0) {
            A* out = static_cast<A*>(backward.sums) + channel;
            out[0] = dy, out[channels] = dyx;
            if (row_count == 3) out[2 * channels] = dyr;
          }
          if (backward.training) fill_mean_terms(rows, 0, dy, dyx, backward.stats, backward, channel);
          if (backward.residual_training)
            fill_mean_terms(rows, 1, dy, dyr, backward.residual_stats, backward, channel);
        }
        __syncthreads();
      }
      const FromShared<T, n> dy{staged + 2 * i * stride}, x{staged + (2 * i + 1) * stride};
      unit_dx<T, layout, n, 1>(backward, unit, dy, x, rows);
    }
  }
}

}  // namespace fused_res::cuda
