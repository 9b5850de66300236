// Launches of the kernels of batch_norm_act.cuh and merge.cuh.
#include "cuda/batch_norm_act.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.h"

namespace fused_res::cuda {
void launch_partials(Dtype dtype, const PartialsArgs& args, Stream stream) {
  dispatch_layout(dtype, args.partition, [&]<class T, Layout layout, int n>() {
    launch(partials_kernel<T, layout, n>, checked_grid(args.partition.units()), kThreads,
           kBlockSumBytes<Accumulator<T>>, stream, args);
  });
}

void launch_merge(bool double_partials, bool double_stats, const MergeArgs& args, Stream stream) {
  const auto kernel = double_partials
                          ? (double_stats ? merge_kernel<double, double> : merge_kernel<double, float>)
                          : (double_stats ? merge_kernel<float, double> : merge_kernel<float, float>);
  const int64_t groups = ceil_div(args.parts, args.parts_per_group);
  launch(kernel, checked_grid(ceil_div(args.channels, kMergeChannels) * groups), kThreads, kMergeSharedBytes,
         stream, args);
}

void launch_sum_partials(bool is_double, const SumPartialsArgs& args, Stream stream) {
  const int64_t groups = ceil_div(args.parts, args.parts_per_group);
  launch(is_double ? sum_partials_kernel<double> : sum_partials_kernel<float>,
         checked_grid(ceil_div(args.width, kMergeChannels) * groups), kThreads, kMergeSharedBytes, stream,
         args);
}

void launch_fold(bool double_stats, const FoldArgs& args, Stream stream) {
  launch(double_stats ? fold_kernel<double> : fold_kernel<float>,
         checked_grid(ceil_div(args.channels, kThreads)), kThreads, 0, stream, args);
}

void launch_apply(Dtype dtype, const ApplyArgs& args, Stream stream) {
  dispatch_layout(dtype, args.partition, [&]<class T, Layout layout, int n>() {
    launch(apply_kernel<T, layout, n>, checked_grid(args.partition.units()), kThreads,
           kChannelBytes<Accumulator<T>>, stream, args);
  });
}

void launch_sums(Dtype dtype, const BackwardArgs& args, Stream stream) {
  dispatch_layout(dtype, args.partition, [&]<class T, Layout layout, int n>() {
    launch(sums_kernel<T, layout, n>, checked_grid(args.partition.units()), kThreads,
           kChannelBytes<Accumulator<T>> + kBlockSumBytes<Accumulator<T>>, stream, args);
  });
}

void launch_dx(Dtype dtype, const BackwardArgs& args, Stream stream) {
  dispatch_layout(dtype, args.partition, [&]<class T, Layout layout, int n>() {
    launch(dx_kernel<T, layout, n>, checked_grid(args.partition.units()), kThreads,
           kChannelBytes<Accumulator<T>>, stream, args);
  });
}

void launch_add_masked(Dtype dtype, const AddMaskedArgs& args, Stream stream) {
  dispatch_vector_size(dtype, args.partition.vector_size, [&]<class T, int n>() {
    launch(add_masked_kernel<T, n>, checked_grid(args.partition.units()), kThreads, 0, stream, args);
  });
}

void launch_update_running(const UpdateRunningArgs& args, int norms, int64_t channels, Stream stream) {
  launch(update_running_kernel, checked_grid(ceil_div(channels, kThreads), norms), kThreads, 0, stream, args);
}

}  // namespace fused_res::cuda
