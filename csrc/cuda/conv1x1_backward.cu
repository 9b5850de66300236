// Launches of the 1x1 convolution backward kernels.
#include "cuda/batch_norm_act.h"
#include "cuda/conv1x1_backward.cuh"
#include "cuda/gemm_dispatch.cuh"
#include "cuda/launch.h"

namespace fused_res::cuda {

void launch_dgrad(const DgradArgs& args, const GemmPartition& partition, MathMode math_mode, bool aligned,
                  Stream stream) {
  const dim3 grid = checked_grid(partition.row_tiles * partition.col_tiles);
  dispatch_tile<true>(math_mode, partition.size, aligned,
                      [&]<class T, bool simt, class Shape, bool is_aligned>() {
                        launch(dgrad_kernel<T, simt, Shape, is_aligned>, grid, Shape::kThreads,
                               kBackwardSharedBytes<DgradLoader<T, Shape, is_aligned>, Shape>, stream, args);
                      });
}

void launch_wgrad(const WgradArgs& args, const GemmPartition& partition, MathMode math_mode, bool aligned,
                  Stream stream) {
  const dim3 grid = checked_grid(partition.row_tiles * partition.col_tiles, 1, partition.splits);
  dispatch_tile<true>(math_mode, partition.size, aligned,
                      [&]<class T, bool simt, class Shape, bool is_aligned>() {
                        launch(wgrad_kernel<T, simt, Shape, is_aligned>, grid, Shape::kThreads,
                               kBackwardSharedBytes<WgradLoader<T, Shape, is_aligned>, Shape>, stream, args);
                      });
  if (args.split_k_workspace == nullptr) return;
  const float* workspace = args.split_k_workspace;
  int64_t splits = partition.splits;
  if (splits > kMaxEpilogueSplits) {
    const int64_t width = args.epilogue.rows * args.epilogue.channels;
    float* total = args.split_k_workspace + splits * width;
    launch_sum_partials(false, {workspace, total, splits, splits, width}, stream);
    workspace = total;
    splits = 1;
  }
  launch_split_k_reduce(math_mode, workspace, splits, args.epilogue, stream);
}

}  // namespace fused_res::cuda
