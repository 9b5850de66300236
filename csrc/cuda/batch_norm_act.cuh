// Multi-pass kernels of batch norm + residual + activation: partial statistics and apply forward, partial
// sums and dx backward, and the small kernels around them. A threadblock computes one work unit.
#pragma once

#include "cuda/batch_norm_device.cuh"

namespace fused_res::cuda {

__device__ inline WorkUnit work_unit_of_block(const WorkPartition& partition) {
  return {static_cast<int64_t>(blockIdx.x) % partition.channel_blocks,
          static_cast<int64_t>(blockIdx.x) / partition.channel_blocks};
}

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
partials_kernel(const __grid_constant__ PartialsArgs args) {
  using A = Accumulator<T>;
  const GlobalSource<T, n> source{static_cast<const T*>(args.x)};
  unit_partials<T, layout, n>(args.partition, work_unit_of_block(args.partition), source, args.partials,
                              reinterpret_cast<A*>(shared_memory()));
}

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
apply_kernel(const __grid_constant__ ApplyArgs args) {
  auto* rows = reinterpret_cast<Accumulator<T>*>(shared_memory());
  const WorkUnit unit = work_unit_of_block(args.partition);
  fill_forward(rows, args, unit);
  __syncthreads();
  unit_apply<T, layout, n, kStepsPerTile>(args, unit, GlobalSource<T, n>{static_cast<const T*>(args.x)},
                                          rows);
}

// Two or three operands are in flight in the backward, so fewer steps of each.
constexpr int kBackwardTile = 2;

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
sums_kernel(const __grid_constant__ BackwardArgs args) {
  using A = Accumulator<T>;
  A *rows = reinterpret_cast<A*>(shared_memory()), *shared = channel_row(rows, 2, 0);
  const WorkUnit unit = work_unit_of_block(args.partition);
  fill_backward_norms(rows, args, unit);
  __syncthreads();
  unit_sums<T, layout, n, kBackwardTile>(args, unit, GlobalSource<T, n>{static_cast<const T*>(args.dy)},
                                         GlobalSource<T, n>{static_cast<const T*>(args.x)}, rows, shared);
}

template <class T, Layout layout, int n>
FUSED_RES_KERNEL(kThreads, 2)
dx_kernel(const __grid_constant__ BackwardArgs args) {
  using A = Accumulator<T>;
  A* rows = reinterpret_cast<A*>(shared_memory());
  const WorkUnit unit = work_unit_of_block(args.partition);
  fill_backward_norms(rows, args, unit);
  const int64_t channels = args.partition.channels,
                channel = unit.first_channel(args.partition) + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < args.partition.block_channels && channel < channels) {
    const A* sums = static_cast<const A*>(args.sums) + channel;
    if (args.training) fill_backward_means(rows, 0, sums[0], sums[channels], args.stats, args, channel);
    if (args.residual_training)
      fill_backward_means(rows, 1, sums[0], sums[2 * channels], args.residual_stats, args, channel);
  }
  __syncthreads();
  unit_dx<T, layout, n, kBackwardTile>(args, unit, GlobalSource<T, n>{static_cast<const T*>(args.dy)},
                                       GlobalSource<T, n>{static_cast<const T*>(args.x)}, rows);
}

// Add grad, masked by a relu_mask, to `into`. The kernel is independent of the layout: the tensors are
// matrices of relu_mask rows and columns.
template <class T, int n>
FUSED_RES_KERNEL(kThreads, 2)
add_masked_kernel(const __grid_constant__ AddMaskedArgs args) {
  using A = Accumulator<T>;
  const WorkUnit unit = work_unit_of_block(args.partition);
  T* into = static_cast<T*>(args.into);
  const GlobalSource<T, n> left{into}, right{static_cast<const T*>(args.grad)};
  TileIterator<Layout::kNhwc, n> read(args.partition, unit.channel_block,
                                      unit.first_tile(args.partition) * kStepsPerTile),
      write = read;
  for (int64_t tile = unit.first_tile(args.partition); tile < unit.last_tile(args.partition); ++tile) {
    Vector<T, n> sum[kStepsPerTile], grad[kStepsPerTile];
    for (int k = 0; k < kStepsPerTile; ++k, read.next()) sum[k] = left(read, 0), grad[k] = right(read, 0);
    for (int k = 0; k < kStepsPerTile; ++k, write.next()) {
      A more[n];
      for (int i = 0; i < n; ++i) more[i] = to_float(grad[k][i]);
      if (args.mask != nullptr) mask_gradient(more, args.mask, write);
      for (int i = 0; i < n; ++i) sum[k][i] = from_float<T>(to_float(sum[k][i]) + more[i]);
      if (write.valid()) store_global(into + write.offset(), sum[k]);
    }
  }
}

template <class A>
FUSED_RES_KERNEL(kThreads, 1)
fold_kernel(const __grid_constant__ FoldArgs args) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel < args.channels) fold_norm<A>(nullptr, args, channel, 0, true);
}

// Update the running statistics of several norms; blockIdx.y is the norm.
FUSED_RES_KERNEL(kThreads, 1) update_running_kernel(const __grid_constant__ UpdateRunningArgs args) {
  const UpdateRunningArgs::Norm& norm = args.norms[blockIdx.y];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= norm.channels) return;
  const Parameter stats{norm.stats, norm.is_double ? Dtype::kFloat64 : Dtype::kFloat32};
  const auto update = [&](void* running, Dtype dtype, int row) {
    const double before = load_parameter(Parameter{running, dtype}, channel, 0.0);
    const double batch = load_parameter(stats, row * norm.channels + channel, 0.0);
    store_parameter(running, dtype, channel, (1.0 - norm.momentum) * before + norm.momentum * batch);
  };
  update(norm.mean, norm.mean_dtype, kMean);
  update(norm.var, norm.var_dtype, kVar);
}

}  // namespace fused_res::cuda
