// Device functions of batch norm + residual + activation, forward and backward, each for one work unit
// (work_partition.h). A `source` functor loads the elements: from global memory, or in single_pass.cuh from
// shared memory.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/merge.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_iterator.cuh"

namespace fused_res::cuda {

// Source of the elements in global memory.
template <class T, int n>
struct GlobalSource {
  const T* data;

  // `step`: index of the step within the work unit. Unused here; SharedSource locates the elements by it.
  template <Layout layout>
  __device__ Vector<T, n> operator()(const TileIterator<layout, n>& iterator, int64_t /*step*/) const {
    return load<n>(data + iterator.offset(), iterator.valid());
  }
};

// Per-channel values of a channel block in shared memory: these rows for the norm of x, and again for the
// norm of the residual. Rows A and B hold a and b of BackwardMeans: mean(dy) and mean(dy * xhat) * invstd.
enum ChannelRow { kRowMean, kRowScale, kRowShift, kRowA, kRowB, kChannelRows };

template <class A>
constexpr int kChannelBytes = 2 * kChannelRows * kMaxBlockChannels * sizeof(A);
template <class A>
constexpr int kBlockSumBytes = kWarpsPerBlock * kMaxBlockChannels * sizeof(A);

template <class A>
__device__ inline A* channel_row(A* rows, int norm, int row) {
  return rows + (norm * kChannelRows + row) * kMaxBlockChannels;
}

// A thread's `columns` channels of a row, in chunks of one access each. The i-th chunks of all threads are
// adjacent, so that load_channels has no bank conflicts.
template <class A, int columns>
struct ChannelChunks {
  static constexpr int kSize = columns < 16 / static_cast<int>(sizeof(A)) ? columns : 16 / sizeof(A);
  static constexpr int kCount = columns / kSize, kStride = kMaxBlockChannels / kCount;

  // Position in a row of a channel, counted from the first one of the channel block.
  static __device__ int position(int channel) {
    const int thread = channel / columns, j = channel % columns;
    return j / kSize * kStride + thread * kSize + j % kSize;
  }
};

// Return the position in a row of the channel with index threadIdx.x in the channel block.
template <class A>
__device__ inline int channel_position(const WorkPartition& partition) {
  const int channel = static_cast<int>(threadIdx.x);
  return partition.vector_size == 8 ? ChannelChunks<A, 8>::position(channel) : channel;
}

// Load this thread's channels of a row, from its channel `first` of the channel block on. The memory barrier
// keeps the compiler from hoisting the load and holding the values in registers.
template <int columns, class A>
__device__ inline void load_channels(A (&values)[columns], const A* row, int first) {
  ptx::compiler_memory_barrier();
  using Chunks = ChannelChunks<A, columns>;
  for (int i = 0; i < Chunks::kCount; ++i) {
    const Vector<A, Chunks::kSize> chunk =
        load<Chunks::kSize>(row + i * Chunks::kStride + first / Chunks::kCount);
    for (int k = 0; k < Chunks::kSize; ++k) values[i * Chunks::kSize + k] = chunk[k];
  }
}

// Fill the mean, scale and shift rows of a norm from its statistics.
template <class A>
__device__ inline void fill_norm(A* rows, int norm, const void* stats, const WorkPartition& partition,
                                 const WorkUnit& unit) {
  const int64_t channel = unit.first_channel(partition) + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= partition.block_channels || channel >= partition.channels) return;
  const A* at = static_cast<const A*>(stats) + channel;
  const int position = channel_position<A>(partition);
  channel_row(rows, norm, kRowMean)[position] = at[kMean * partition.channels];
  channel_row(rows, norm, kRowScale)[position] = at[kScale * partition.channels];
  channel_row(rows, norm, kRowShift)[position] = at[kShift * partition.channels];
}

// Normalize n elements with the rows of one norm. `first`: the thread's first channel within the channel
// block.
template <class T, Layout layout, int n>
__device__ inline void normalize_vector(Accumulator<T> (&y)[n], const Vector<T, n>& x, Accumulator<T>* rows,
                                        int norm, int first) {
  constexpr int columns = kChannelsPerThread<layout, n>;
  Accumulator<T> mean[columns], scale[columns], shift[columns];
  load_channels(mean, channel_row(rows, norm, kRowMean), first);
  load_channels(scale, channel_row(rows, norm, kRowScale), first);
  load_channels(shift, channel_row(rows, norm, kRowShift), first);
  for (int i = 0; i < n; ++i) {
    const int j = channel_index<layout>(i);
    y[i] = batch_normalize(to_float(x[i]), mean[j], scale[j], shift[j]);
  }
}

// --- statistics ---

// Compute the partial statistics of a part by the shifted-data algorithm: sums of deviations from a pivot,
// the mean of the part's first tile. Let p be the pivot, m the mean of the part, K the number of values of
// the first tile and N that of the part. The first tile alone gives M2 >= K (m - p)^2, so the term that is
// subtracted from the sum of squares, N (m - p)^2, is at most N / K times M2: cancellation loses at most a
// factor of the number of tiles of a part.
template <class T, Layout layout, int n, class Source>
__device__ void unit_partials(const WorkPartition& partition, const WorkUnit& unit, const Source& source,
                              void* partials, Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr int columns = kChannelsPerThread<layout, n>;
  const int64_t first = unit.first_tile(partition), last = unit.last_tile(partition);
  TileIterator<layout, n> iterator(partition, unit.channel_block, first * kStepsPerTile);
  A pivot[columns] = {}, sum1[columns] = {}, sum2[columns] = {};
  for (int64_t tile = first; tile < last; ++tile) {
    Vector<T, n> x[kStepsPerTile];
    bool inside[kStepsPerTile];
    for (int k = 0; k < kStepsPerTile; ++k, iterator.next()) {
      x[k] = source(iterator, (tile - first) * kStepsPerTile + k);
      inside[k] = iterator.valid();
    }
    if (tile == first) {
      for (int k = 0; k < kStepsPerTile; ++k)  // elements outside of the tensor are zeros
        for (int i = 0; i < n; ++i) pivot[channel_index<layout>(i)] += to_float(x[k][i]);
      block_sum<layout, n>(pivot, partition, shared);
      const A count =
          static_cast<A>(values_before_tile(partition, first + 1) - values_before_tile(partition, first));
      for (int j = 0; j < columns; ++j) pivot[j] /= count;
    }
    for (int k = 0; k < kStepsPerTile; ++k) {
      for (int i = 0; i < n; ++i) {
        const int j = channel_index<layout>(i);
        const A d = inside[k] ? to_float(x[k][i]) - pivot[j] : A(0);
        sum1[j] += d;
        sum2[j] = fma(d, d, sum2[j]);
      }
    }
  }
  block_sum<layout, n>(sum1, partition, shared);
  block_sum<layout, n>(sum2, partition, shared);

  const int64_t channel = unit.first_channel(partition) + first_thread_channel<layout, n>(partition);
  if (!is_channel_leader(partition)) return;
  const A count = static_cast<A>(values_before_tile(partition, last) - values_before_tile(partition, first));
  A* out = static_cast<A*>(partials) + unit.part * 4 * partition.channels + channel;
  for (int j = 0; j < columns; ++j) {
    if (channel + j >= partition.channels) break;
    // TwoSum (Knuth): the fourth row is the rounding error of mean = pivot + step.
    const A step = sum1[j] / count, mean = pivot[j] + step, taken = mean - pivot[j];
    const A m2 = sum2[j] - sum1[j] * (sum1[j] / count);
    out[j] = count;
    out[j + partition.channels] = mean;
    out[j + 2 * partition.channels] = m2 < 0 ? A(0) : m2;  // max(m2, 0) would drop NaN
    out[j + 3 * partition.channels] = (pivot[j] - (mean - taken)) + (step - taken);
  }
}

// --- forward ---

// Compute the mean, scale = weight * invstd and shift = bias of a channel from its running statistics and
// parameters, for y = (x - mean) * scale + shift. Store them in the rows in shared memory (unless `rows` is
// null) at `position`, and write `stats` if `write`.
template <class A>
__device__ void fold_norm(A* rows, const FoldArgs& fold, int64_t channel, int position, bool write) {
  const A mean = load_parameter(fold.mean, channel, A(0)), var = load_parameter(fold.var, channel, A(0));
  const A invstd = A(1) / sqrt(var + static_cast<A>(fold.eps));
  const A scale = invstd * load_parameter(fold.weight, channel, A(1));
  const A shift = load_parameter(fold.bias, channel, A(0));
  if (rows != nullptr) {
    channel_row(rows, 0, kRowMean)[position] = mean;
    channel_row(rows, 0, kRowScale)[position] = scale;
    channel_row(rows, 0, kRowShift)[position] = shift;
  }
  if (write && fold.stats != nullptr)
    write_stats(static_cast<A*>(fold.stats), fold.channels, channel, {mean, invstd, scale, shift}, var);
}

// Fill mean, scale and shift of the norm, from `stats` or folded from running statistics, and, if normalized,
// of the residual's norm. The first part of a channel block writes the folded `stats`.
template <class A>
__device__ inline void fill_forward(A* rows, const ApplyArgs& args, const WorkUnit& unit) {
  const WorkPartition& partition = args.partition;
  if (!args.fold.active) {
    fill_norm(rows, 0, args.stats, partition, unit);
  } else {
    const int64_t channel = unit.first_channel(partition) + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < partition.block_channels && channel < partition.channels)
      fold_norm(rows, args.fold, channel, channel_position<A>(partition), unit.part == 0);
  }
  if (args.residual_stats != nullptr) fill_norm(rows, 1, args.residual_stats, partition, unit);
}

// Apply normalization, residual and activation to a work unit. The channel rows must be filled. `tile`:
// number of steps whose loads are in flight at once, a divisor of kStepsPerTile.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_apply(const ApplyArgs& args, const WorkUnit& unit, const Source& source,
                           Accumulator<T>* rows) {
  using A = Accumulator<T>;
  const WorkPartition& partition = args.partition;
  const int own = first_thread_channel<layout, n>(partition);
  const GlobalSource<T, n> residual{static_cast<const T*>(args.residual)};
  const int64_t first = unit.first_tile(partition) * kStepsPerTile,
                last = unit.last_tile(partition) * kStepsPerTile;
  TileIterator<layout, n> read(partition, unit.channel_block, first), write = read;
  for (int64_t step = first; step < last; step += tile) {
    Vector<T, n> x[tile], r[tile];
    for (int k = 0; k < tile; ++k, read.next()) {
      x[k] = source(read, step - first + k);
      r[k] = args.residual != nullptr ? residual(read, 0) : Vector<T, n>{};
    }
    for (int k = 0; k < tile; ++k, write.next()) {
      const bool inside = write.valid();
      A y[n], added[n];
      normalize_vector<T, layout>(y, x[k], rows, 0, own);
      if (args.residual_stats != nullptr) {
        normalize_vector<T, layout>(added, r[k], rows, 1, own);
        for (int i = 0; i < n; ++i) y[i] += added[i];
      } else if (args.residual != nullptr) {
        for (int i = 0; i < n; ++i) y[i] += to_float(r[k][i]);
      }
      if (args.mask != nullptr) {
        unsigned bits = 0;
        for (int i = 0; i < n; ++i) bits |= static_cast<unsigned>(inside && relu_grad_mask(y[i])) << i;
        bits = pack_mask_byte<n>(bits);
        if (inside && write.bit() == 0) args.mask[write.mask_offset()] = static_cast<uint8_t>(bits);
      }
      Vector<T, n> out;
      for (int i = 0; i < n; ++i) out[i] = from_float<T>(args.relu ? relu(y[i]) : y[i]);
      if (inside) store_global(static_cast<T*>(args.y) + write.offset(), out);
    }
  }
}

// --- backward ---

// Mask dy by the relu_mask. Outside of the tensor dy is already 0.
template <class A, int n, Layout layout>
__device__ inline void mask_gradient(A (&dy)[n], const uint8_t* mask,
                                     const TileIterator<layout, n>& iterator) {
  const unsigned bits = iterator.valid() ? mask[iterator.mask_offset()] >> iterator.bit() : 0;
  for (int i = 0; i < n; ++i) dy[i] = bits >> i & 1 ? dy[i] : A(0);
}

// Compute dy masked by the ReLU, from the relu_mask or else from the recomputed sign of bn(x).
template <class T, Layout layout, int n>
__device__ inline void masked_dy(Accumulator<T> (&dy)[n], const Vector<T, n>& loaded, const Vector<T, n>& x,
                                 const BackwardArgs& args, const TileIterator<layout, n>& iterator,
                                 Accumulator<T>* rows) {
  using A = Accumulator<T>;
  for (int i = 0; i < n; ++i) dy[i] = to_float(loaded[i]);
  if (args.mask != nullptr) {
    mask_gradient(dy, args.mask, iterator);
  } else if (args.relu) {
    const int own = first_thread_channel<layout, n>(args.partition);
    A y[n];
    normalize_vector<T, layout>(y, x, rows, 0, own);
    for (int i = 0; i < n; ++i) dy[i] = relu_grad_mask(y[i]) ? dy[i] : A(0);
  }
}

// Compute the partial backward sums of a part: sum of dy, dy * xhat and, with a normalized residual, dy *
// residual xhat. fill_backward_norms() must have run. The loop sums dy * (x - mean), which invstd multiplies
// at the end.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_sums(const BackwardArgs& args, const WorkUnit& unit, const Source& dy_source,
                          const Source& x_source, Accumulator<T>* rows, Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr int columns = kChannelsPerThread<layout, n>;
  const WorkPartition& partition = args.partition;
  const int own = first_thread_channel<layout, n>(partition);
  A sum_dy[columns] = {}, sum_dyx[columns] = {}, sum_dyr[columns] = {};
  const GlobalSource<T, n> residual{static_cast<const T*>(args.residual)};
  const int64_t first = unit.first_tile(partition) * kStepsPerTile,
                last = unit.last_tile(partition) * kStepsPerTile;
  TileIterator<layout, n> read(partition, unit.channel_block, first), use = read;
  for (int64_t step = first; step < last; step += tile) {
    Vector<T, n> loaded[tile], x[tile], r[tile];
    for (int k = 0; k < tile; ++k, read.next()) {
      loaded[k] = dy_source(read, step - first + k);
      x[k] = x_source(read, step - first + k);
      r[k] = args.residual != nullptr ? residual(read, 0) : Vector<T, n>{};
    }
    for (int k = 0; k < tile; ++k, use.next()) {
      A dy[n], mean[columns];
      masked_dy(dy, loaded[k], x[k], args, use, rows);
      load_channels(mean, channel_row(rows, 0, kRowMean), own);
      for (int i = 0; i < n; ++i) {
        const int j = channel_index<layout>(i);
        sum_dy[j] += dy[i];
        sum_dyx[j] = fma(dy[i], to_float(x[k][i]) - mean[j], sum_dyx[j]);
      }
      if (args.residual == nullptr) continue;
      load_channels(mean, channel_row(rows, 1, kRowMean), own);
      for (int i = 0; i < n; ++i) {
        const int j = channel_index<layout>(i);
        sum_dyr[j] = fma(dy[i], to_float(r[k][i]) - mean[j], sum_dyr[j]);
      }
    }
  }
  block_sum<layout, n>(sum_dy, partition, shared);
  block_sum<layout, n>(sum_dyx, partition, shared);
  if (args.residual != nullptr) block_sum<layout, n>(sum_dyr, partition, shared);

  const int64_t channel = unit.first_channel(partition) + own;
  if (!is_channel_leader(partition)) return;
  const A* invstd = static_cast<const A*>(args.stats) + kInvstd * partition.channels + channel;
  const A* r_invstd = static_cast<const A*>(args.residual_stats) + kInvstd * partition.channels + channel;
  A* out = static_cast<A*>(args.partials) + unit.part * args.sums_rows * partition.channels + channel;
  for (int j = 0; j < columns; ++j) {
    if (channel + j >= partition.channels) break;
    out[j] = sum_dy[j];
    out[j + partition.channels] = sum_dyx[j] * invstd[j];
    if (args.residual != nullptr) out[j + 2 * partition.channels] = sum_dyr[j] * r_invstd[j];
  }
}

// Fill rows A and B of this thread's channel with mean(dy) and mean(dy * xhat) * invstd, from the sums.
template <class A>
__device__ inline void fill_backward_means(A* rows, int norm, A sum_dy, A sum_dy_xhat, const void* stats,
                                           const BackwardArgs& args, int64_t channel) {
  const A invstd = static_cast<const A*>(stats)[kInvstd * args.partition.channels + channel];
  const BackwardMeans<A> terms = backward_means(sum_dy, sum_dy_xhat, static_cast<A>(args.count), invstd);
  const int position = channel_position<A>(args.partition);
  channel_row(rows, norm, kRowA)[position] = terms.a;
  channel_row(rows, norm, kRowB)[position] = terms.b;
}

// Fill mean, scale and shift of the norm and, if normalized, of the residual's norm.
template <class A>
__device__ inline void fill_backward_norms(A* rows, const BackwardArgs& args, const WorkUnit& unit) {
  fill_norm(rows, 0, args.stats, args.partition, unit);
  if (args.residual_stats != nullptr) fill_norm(rows, 1, args.residual_stats, args.partition, unit);
}

// Store the gradient with respect to one norm's input.
template <class T, Layout layout, int n>
__device__ inline void store_norm_input_grad(T* out, const Accumulator<T> (&dy)[n], const Vector<T, n>& z,
                                             bool training, const TileIterator<layout, n>& iterator,
                                             Accumulator<T>* rows, int norm, int own) {
  using A = Accumulator<T>;
  constexpr int columns = kChannelsPerThread<layout, n>;
  A scale[columns];
  load_channels(scale, channel_row(rows, norm, kRowScale), own);
  Vector<T, n> dz;
  if (training) {
    A mean[columns], a[columns], b[columns];
    load_channels(mean, channel_row(rows, norm, kRowMean), own);
    load_channels(a, channel_row(rows, norm, kRowA), own);
    load_channels(b, channel_row(rows, norm, kRowB), own);
    for (int i = 0; i < n; ++i) {
      const int j = channel_index<layout>(i);
      dz[i] = from_float<T>(norm_input_grad(dy[i], to_float(z[i]), mean[j], scale[j], a[j], b[j]));
    }
  } else {
    for (int i = 0; i < n; ++i) dz[i] = from_float<T>(dy[i] * scale[channel_index<layout>(i)]);
  }
  if (iterator.valid()) store_global(out + iterator.offset(), dz);
}

// Compute dx and the residual gradient of a work unit. fill_backward_norms() and, with batch statistics,
// fill_backward_means() must have run, and the threadblock must have synchronized.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_dx(const BackwardArgs& args, const WorkUnit& unit, const Source& dy_source,
                        const Source& x_source, Accumulator<T>* rows) {
  using A = Accumulator<T>;
  const WorkPartition& partition = args.partition;
  const int own = first_thread_channel<layout, n>(partition);
  T *dx = static_cast<T*>(args.dx), *dresidual = static_cast<T*>(args.dresidual);
  const GlobalSource<T, n> residual{static_cast<const T*>(args.residual)};
  const bool reads_x = (dx != nullptr && args.training) || (args.mask == nullptr && args.relu);
  const bool reads_residual =
      dresidual != nullptr && args.residual_stats != nullptr && args.residual_training;
  const int64_t first = unit.first_tile(partition) * kStepsPerTile,
                last = unit.last_tile(partition) * kStepsPerTile;
  TileIterator<layout, n> read(partition, unit.channel_block, first), write = read;
  for (int64_t step = first; step < last; step += tile) {
    Vector<T, n> loaded[tile], x[tile], r[tile];
    for (int k = 0; k < tile; ++k, read.next()) {
      loaded[k] = dy_source(read, step - first + k);
      x[k] = reads_x ? x_source(read, step - first + k) : Vector<T, n>{};
      r[k] = reads_residual ? residual(read, 0) : Vector<T, n>{};
    }
    for (int k = 0; k < tile; ++k, write.next()) {
      A dy[n];
      masked_dy(dy, loaded[k], x[k], args, write, rows);
      if (dx != nullptr) store_norm_input_grad(dx, dy, x[k], args.training, write, rows, 0, own);
      if (dresidual == nullptr) continue;
      if (args.residual_stats != nullptr) {
        store_norm_input_grad(dresidual, dy, r[k], args.residual_training, write, rows, 1, own);
      } else if (write.valid()) {
        Vector<T, n> out;
        for (int i = 0; i < n; ++i) out[i] = from_float<T>(dy[i]);
        store_global(dresidual + write.offset(), out);
      }
    }
  }
}

}  // namespace fused_res::cuda
