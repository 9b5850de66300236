// act(bn(x) [+ residual]) and its backward, for one unit of work (see cut.h). Where the elements come from is
// a `source`: global memory, or in single_pass.cuh shared memory.
#pragma once

#include "cuda/batch_norm_act.h"
#include "cuda/merge.cuh"
#include "cuda/ptx.cuh"
#include "cuda/walk.cuh"

namespace fused_res::cuda {

template <class T, int n>
struct FromGlobal {
  const T* data;

  // `step`: of the unit.
  template <Layout layout>
  __device__ Vector<T, n> operator()(const Walk<layout, n>& walk, int64_t /*step*/) const {
    return load<n>(data + walk.offset(), walk.inside());
  }
};

// What the threads of a block know of its channels' norms, in shared memory: these rows for the norm of x,
// and again for the residual's.
enum ChannelRow { kRowMean, kRowScale, kRowShift, kRowA, kRowB, kChannelRows };

template <class A>
constexpr int kChannelBytes = 2 * kChannelRows * kMostChannels * sizeof(A);
template <class A>
constexpr int kBlockSumBytes = kWarps * kMostChannels * sizeof(A);

template <class A>
__device__ inline A* channel_row(A* rows, int norm, int row) {
  return rows + (norm * kChannelRows + row) * kMostChannels;
}

// This thread's channels of a row, read here and now.
template <int columns, class A>
__device__ inline void load_columns(A (&values)[columns], const A* row) {
  ptx::reread_memory();
  constexpr int n = columns < 16 / static_cast<int>(sizeof(A)) ? columns : 16 / sizeof(A);
  for (int j = 0; j < columns; j += n) {
    const Vector<A, n> some = load<n>(row + j);
    for (int i = 0; i < n; ++i) values[j + i] = some[i];
  }
}

template <class A>
__device__ inline void fill_norm(A* rows, int norm, const void* stats, const Cut& cut, const Unit& unit) {
  const int64_t channel = unit.first_channel(cut) + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= cut.block_channels || channel >= cut.channels) return;
  const A* at = static_cast<const A*>(stats) + channel;
  channel_row(rows, norm, kRowMean)[threadIdx.x] = at[kMean * cut.channels];
  channel_row(rows, norm, kRowScale)[threadIdx.x] = at[kScale * cut.channels];
  channel_row(rows, norm, kRowShift)[threadIdx.x] = at[kShift * cut.channels];
}

template <class T, Layout layout, int n>
__device__ inline void normalise_vector(Accumulator<T> (&y)[n], const Vector<T, n>& x, Accumulator<T>* rows,
                                        int norm, int first) {
  constexpr int columns = kColumns<layout, n>;
  Accumulator<T> mean[columns], scale[columns], shift[columns];
  load_columns(mean, channel_row(rows, norm, kRowMean) + first);
  load_columns(scale, channel_row(rows, norm, kRowScale) + first);
  load_columns(shift, channel_row(rows, norm, kRowShift) + first);
  for (int i = 0; i < n; ++i) {
    const int j = column<layout>(i);
    y[i] = normalise(to_float(x[i]), mean[j], scale[j], shift[j]);
  }
}

// --- statistics ---

// Sums around a pivot, which is the mean of the part's first tile. Cancellation is bounded: k of a part's n
// values, with the mean p, alone make up M2 >= k (p - mean)^2, so that what is subtracted, n (p - mean)^2, is
// at most n / k times the result: the tiles of a part.
template <class T, Layout layout, int n, class Source>
__device__ void unit_partials(const Cut& cut, const Unit& unit, const Source& source, void* partials,
                              Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<layout, n>;
  const int64_t first = unit.first_tile(cut), last = unit.last_tile(cut);
  Walk<layout, n> walk(cut, unit.block, first * kTile);
  A pivot[columns] = {}, sum1[columns] = {}, sum2[columns] = {};
  for (int64_t tile = first; tile < last; ++tile) {
    Vector<T, n> x[kTile];
    bool inside[kTile];
    for (int k = 0; k < kTile; ++k, walk.next()) {
      x[k] = source(walk, (tile - first) * kTile + k);
      inside[k] = walk.inside();
    }
    if (tile == first) {
      for (int k = 0; k < kTile; ++k)  // zeros outside
        for (int i = 0; i < n; ++i) pivot[column<layout>(i)] += to_float(x[k][i]);
      block_sum<layout, n>(pivot, cut, shared);
      const A count = static_cast<A>(values_before(cut, first + 1) - values_before(cut, first));
      for (int j = 0; j < columns; ++j) pivot[j] /= count;
    }
    for (int k = 0; k < kTile; ++k) {
      for (int i = 0; i < n; ++i) {
        const int j = column<layout>(i);
        const A d = inside[k] ? to_float(x[k][i]) - pivot[j] : A(0);
        sum1[j] += d;
        sum2[j] = fma(d, d, sum2[j]);
      }
    }
  }
  block_sum<layout, n>(sum1, cut, shared);
  block_sum<layout, n>(sum2, cut, shared);

  const int64_t channel = unit.first_channel(cut) + first_column<layout, n>(cut);
  if (!is_first_of_channels(cut)) return;
  const A count = static_cast<A>(values_before(cut, last) - values_before(cut, first));
  A* out = static_cast<A*>(partials) + unit.part * 4 * cut.channels + channel;
  for (int j = 0; j < columns; ++j) {
    if (channel + j >= cut.channels) break;
    const A step = sum1[j] / count, mean = pivot[j] + step, taken = mean - pivot[j];
    const A m2 = sum2[j] - sum1[j] * (sum1[j] / count);
    out[j] = count;
    out[j + cut.channels] = mean;
    out[j + 2 * cut.channels] = m2 < 0 ? A(0) : m2;  // NaN stays
    out[j + 3 * cut.channels] = (pivot[j] - (mean - taken)) + (step - taken);
  }
}

// --- forward ---

// Fills the block's rows from running statistics, and writes `stats` where this is the first of its parts.
template <class A>
__device__ void fold_norm(A* rows, const FoldArgs& fold, int64_t channel, int column, bool write) {
  const A mean = load_parameter(fold.mean, channel, A(0)), var = load_parameter(fold.var, channel, A(0));
  const A invstd = A(1) / sqrt(var + static_cast<A>(fold.eps));
  const A scale = invstd * load_parameter(fold.weight, channel, A(1));
  const A shift = load_parameter(fold.bias, channel, A(0));
  if (rows != nullptr) {
    channel_row(rows, 0, kRowMean)[column] = mean;
    channel_row(rows, 0, kRowScale)[column] = scale;
    channel_row(rows, 0, kRowShift)[column] = shift;
  }
  if (write && fold.stats != nullptr)
    write_stats(static_cast<A*>(fold.stats), fold.channels, channel, {mean, invstd, scale, shift}, var);
}

template <class A>
__device__ inline void fill_forward(A* rows, const ApplyArgs& args, const Unit& unit) {
  const Cut& cut = args.cut;
  if (!args.fold.active) {
    fill_norm(rows, 0, args.stats, cut, unit);
  } else {
    const int64_t channel = unit.first_channel(cut) + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < cut.block_channels && channel < cut.channels)
      fold_norm(rows, args.fold, channel, threadIdx.x, unit.part == 0);
  }
  if (args.residual_stats != nullptr) fill_norm(rows, 1, args.residual_stats, cut, unit);
}

// Expects the block's rows to be filled. `tile`: steps whose loads are under way at once.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_apply(const ApplyArgs& args, const Unit& unit, const Source& source,
                           Accumulator<T>* rows) {
  using A = Accumulator<T>;
  const Cut& cut = args.cut;
  const int own = first_column<layout, n>(cut);
  const FromGlobal<T, n> residual{static_cast<const T*>(args.residual)};
  const int64_t first = unit.first_tile(cut) * kTile, last = unit.last_tile(cut) * kTile;
  Walk<layout, n> read(cut, unit.block, first), write = read;
  for (int64_t step = first; step < last; step += tile) {
    Vector<T, n> x[tile], r[tile];
    for (int k = 0; k < tile; ++k, read.next()) {
      x[k] = source(read, step - first + k);
      r[k] = args.residual != nullptr ? residual(read, 0) : Vector<T, n>{};
    }
    for (int k = 0; k < tile; ++k, write.next()) {
      const bool inside = write.inside();
      A y[n], added[n];
      normalise_vector<T, layout>(y, x[k], rows, 0, own);
      if (args.residual_stats != nullptr) {
        normalise_vector<T, layout>(added, r[k], rows, 1, own);
        for (int i = 0; i < n; ++i) y[i] += added[i];
      } else if (args.residual != nullptr) {
        for (int i = 0; i < n; ++i) y[i] += to_float(r[k][i]);
      }
      if (args.mask != nullptr) {
        unsigned bits = 0;
        for (int i = 0; i < n; ++i) bits |= static_cast<unsigned>(inside && passes(y[i])) << i;
        bits = whole_byte<n>(bits);
        if (inside && write.bit() == 0) args.mask[write.mask_offset()] = static_cast<uint8_t>(bits);
      }
      Vector<T, n> out;
      for (int i = 0; i < n; ++i) out[i] = from_float<T>(args.relu ? relu(y[i]) : y[i]);
      if (inside) store_global(static_cast<T*>(args.y) + write.offset(), out);
    }
  }
}

// --- backward ---

// dy where the ReLU let the value through, else 0; outside of the tensor dy is 0 already.
template <class A, int n, Layout layout>
__device__ inline void mask_gradient(A (&dy)[n], const uint8_t* mask, const Walk<layout, n>& walk) {
  const unsigned bits = walk.inside() ? mask[walk.mask_offset()] >> walk.bit() : 0;
  for (int i = 0; i < n; ++i) dy[i] = bits >> i & 1 ? dy[i] : A(0);
}

template <class T, Layout layout, int n>
__device__ inline void masked_dy(Accumulator<T> (&dy)[n], const Vector<T, n>& loaded, const Vector<T, n>& x,
                                 const BackwardArgs& args, const Walk<layout, n>& walk,
                                 Accumulator<T>* rows) {
  using A = Accumulator<T>;
  for (int i = 0; i < n; ++i) dy[i] = to_float(loaded[i]);
  if (args.mask != nullptr) {
    mask_gradient(dy, args.mask, walk);
  } else if (args.relu) {
    const int own = first_column<layout, n>(args.cut);
    A y[n];
    normalise_vector<T, layout>(y, x, rows, 0, own);
    for (int i = 0; i < n; ++i) dy[i] = passes(y[i]) ? dy[i] : A(0);
  }
}

// Expects the norms' rows to be filled.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_sums(const BackwardArgs& args, const Unit& unit, const Source& dy_source,
                          const Source& x_source, Accumulator<T>* rows, Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<layout, n>;
  const Cut& cut = args.cut;
  const int own = first_column<layout, n>(cut);
  A sum_dy[columns] = {}, sum_dyx[columns] = {}, sum_dyr[columns] = {};
  const FromGlobal<T, n> residual{static_cast<const T*>(args.residual)};
  const int64_t first = unit.first_tile(cut) * kTile, last = unit.last_tile(cut) * kTile;
  Walk<layout, n> read(cut, unit.block, first), use = read;
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
      load_columns(mean, channel_row(rows, 0, kRowMean) + own);
      for (int i = 0; i < n; ++i) {
        const int j = column<layout>(i);
        sum_dy[j] += dy[i];
        sum_dyx[j] = fma(dy[i], to_float(x[k][i]) - mean[j], sum_dyx[j]);
      }
      if (args.residual == nullptr) continue;
      load_columns(mean, channel_row(rows, 1, kRowMean) + own);
      for (int i = 0; i < n; ++i) {
        const int j = column<layout>(i);
        sum_dyr[j] = fma(dy[i], to_float(r[k][i]) - mean[j], sum_dyr[j]);
      }
    }
  }
  block_sum<layout, n>(sum_dy, cut, shared);
  block_sum<layout, n>(sum_dyx, cut, shared);
  if (args.residual != nullptr) block_sum<layout, n>(sum_dyr, cut, shared);

  const int64_t channel = unit.first_channel(cut) + own;
  if (!is_first_of_channels(cut)) return;
  const A* invstd = static_cast<const A*>(args.stats) + kInvstd * cut.channels + channel;
  const A* r_invstd = static_cast<const A*>(args.residual_stats) + kInvstd * cut.channels + channel;
  A* out = static_cast<A*>(args.partials) + unit.part * args.sums_rows * cut.channels + channel;
  for (int j = 0; j < columns; ++j) {
    if (channel + j >= cut.channels) break;
    out[j] = sum_dy[j];
    out[j + cut.channels] = sum_dyx[j] * invstd[j];
    if (args.residual != nullptr) out[j + 2 * cut.channels] = sum_dyr[j] * r_invstd[j];
  }
}

// What the backward takes from the sums, for the threads' first channels; the norms' rows are filled already.
template <class A>
__device__ inline void fill_mean_terms(A* rows, int norm, A sum_dy, A sum_dy_xhat, const void* stats,
                                       const BackwardArgs& args, int64_t channel) {
  const A invstd = static_cast<const A*>(stats)[kInvstd * args.cut.channels + channel];
  const MeanTerms<A> terms = mean_terms(sum_dy, sum_dy_xhat, static_cast<A>(args.count), invstd);
  channel_row(rows, norm, kRowA)[threadIdx.x] = terms.a;
  channel_row(rows, norm, kRowB)[threadIdx.x] = terms.b;
}

template <class A>
__device__ inline void fill_backward_norms(A* rows, const BackwardArgs& args, const Unit& unit) {
  fill_norm(rows, 0, args.stats, args.cut, unit);
  if (args.residual_stats != nullptr) fill_norm(rows, 1, args.residual_stats, args.cut, unit);
}

// The gradient of one norm's input.
template <class T, Layout layout, int n>
__device__ inline void store_before_norm(T* out, const Accumulator<T> (&dy)[n], const Vector<T, n>& z,
                                         bool training, const Walk<layout, n>& walk, Accumulator<T>* rows,
                                         int norm, int own) {
  using A = Accumulator<T>;
  constexpr int columns = kColumns<layout, n>;
  A scale[columns];
  load_columns(scale, channel_row(rows, norm, kRowScale) + own);
  Vector<T, n> dz;
  if (training) {
    A mean[columns], a[columns], b[columns];
    load_columns(mean, channel_row(rows, norm, kRowMean) + own);
    load_columns(a, channel_row(rows, norm, kRowA) + own);
    load_columns(b, channel_row(rows, norm, kRowB) + own);
    for (int i = 0; i < n; ++i) {
      const int j = column<layout>(i);
      dz[i] = from_float<T>(before_norm(dy[i], to_float(z[i]), mean[j], scale[j], a[j], b[j]));
    }
  } else {
    for (int i = 0; i < n; ++i) dz[i] = from_float<T>(dy[i] * scale[column<layout>(i)]);
  }
  if (walk.inside()) store_global(out + walk.offset(), dz);
}

// Expects the norms' rows, and those of the mean terms where there are batch statistics, to be filled.
template <class T, Layout layout, int n, int tile, class Source>
__device__ void unit_dx(const BackwardArgs& args, const Unit& unit, const Source& dy_source,
                        const Source& x_source, Accumulator<T>* rows) {
  using A = Accumulator<T>;
  const Cut& cut = args.cut;
  const int own = first_column<layout, n>(cut);
  T *dx = static_cast<T*>(args.dx), *dresidual = static_cast<T*>(args.dresidual);
  const FromGlobal<T, n> residual{static_cast<const T*>(args.residual)};
  const bool reads_x = (dx != nullptr && args.training) || (args.mask == nullptr && args.relu);
  const bool reads_residual =
      dresidual != nullptr && args.residual_stats != nullptr && args.residual_training;
  const int64_t first = unit.first_tile(cut) * kTile, last = unit.last_tile(cut) * kTile;
  Walk<layout, n> read(cut, unit.block, first), write = read;
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
      if (dx != nullptr) store_before_norm(dx, dy, x[k], args.training, write, rows, 0, own);
      if (dresidual == nullptr) continue;
      if (args.residual_stats != nullptr) {
        store_before_norm(dresidual, dy, r[k], args.residual_training, write, rows, 1, own);
      } else if (write.inside()) {
        Vector<T, n> out;
        for (int i = 0; i < n; ++i) out[i] = from_float<T>(dy[i]);
        store_global(dresidual + write.offset(), out);
      }
    }
  }
}

}  // namespace fused_res::cuda
