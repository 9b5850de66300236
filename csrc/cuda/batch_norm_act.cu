// Launches of batch_norm_act.cuh and merge.cuh.
#include "cuda/batch_norm_act.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/launch.h"

namespace fused_res::cuda {
namespace {

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace

void launch_partials(Dtype dtype, const PartialsArgs& args, Stream stream) {
  with_walk(dtype, args.cut, [&]<class T, Layout layout, int n>() {
    launch(partials_kernel<T, layout, n>, grid_of(args.cut.units()), kThreads, kBlockSumBytes<Accumulator<T>>,
           stream, args);
  });
}

void launch_merge(bool double_partials, bool double_stats, const MergeArgs& args, Stream stream) {
  const auto kernel = double_partials
                          ? (double_stats ? merge_kernel<double, double> : merge_kernel<double, float>)
                          : (double_stats ? merge_kernel<float, double> : merge_kernel<float, float>);
  const int64_t groups = ceil_div(args.parts, args.parts_per_group);
  launch(kernel, grid_of(ceil_div(args.channels, kMergedAtOnce) * groups), kThreads, kMergeShared, stream,
         args);
}

void launch_add_parts(bool is_double, const AddPartsArgs& args, Stream stream) {
  const int64_t groups = ceil_div(args.parts, args.parts_per_group);
  launch(is_double ? add_parts_kernel<double> : add_parts_kernel<float>,
         grid_of(ceil_div(args.width, kMergedAtOnce) * groups), kThreads, kMergeShared, stream, args);
}

void launch_fold(bool double_stats, const FoldArgs& args, Stream stream) {
  launch(double_stats ? fold_kernel<double> : fold_kernel<float>, grid_of(ceil_div(args.channels, kThreads)),
         kThreads, 0, stream, args);
}

void launch_apply(Dtype dtype, const ApplyArgs& args, Stream stream) {
  with_walk(dtype, args.cut, [&]<class T, Layout layout, int n>() {
    launch(apply_kernel<T, layout, n>, grid_of(args.cut.units()), kThreads, kChannelBytes<Accumulator<T>>,
           stream, args);
  });
}

void launch_sums(Dtype dtype, const BackwardArgs& args, Stream stream) {
  with_walk(dtype, args.cut, [&]<class T, Layout layout, int n>() {
    launch(sums_kernel<T, layout, n>, grid_of(args.cut.units()), kThreads,
           kChannelBytes<Accumulator<T>> + kBlockSumBytes<Accumulator<T>>, stream, args);
  });
}

void launch_dx(Dtype dtype, const BackwardArgs& args, Stream stream) {
  with_walk(dtype, args.cut, [&]<class T, Layout layout, int n>() {
    launch(dx_kernel<T, layout, n>, grid_of(args.cut.units()), kThreads, kChannelBytes<Accumulator<T>>,
           stream, args);
  });
}

void launch_add_masked(Dtype dtype, const AddMaskedArgs& args, Stream stream) {
  with_vector(dtype, args.cut.vector, [&]<class T, int n>() {
    launch(add_masked_kernel<T, n>, grid_of(args.cut.units()), kThreads, 0, stream, args);
  });
}

void launch_update_running(const UpdateRunningArgs& args, int norms, int64_t channels, Stream stream) {
  launch(update_running_kernel, dim3(static_cast<unsigned>(ceil_div(channels, kThreads)), norms), kThreads, 0,
         stream, args);
}

}  // namespace fused_res::cuda
