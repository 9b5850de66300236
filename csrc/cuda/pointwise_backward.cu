#include "cuda/batch_norm_act.h"
#include "cuda/launch.h"
#include "cuda/pointwise_backward.cuh"
#include "cuda/product_dispatch.cuh"

namespace fused_res::cuda {

void launch_dgrad(const DgradArgs& args, const ProductCut& cut, Arithmetic arithmetic, bool aligned,
                  Stream stream) {
  const dim3 grid(static_cast<unsigned>(cut.row_tiles * cut.col_tiles));
  with_tile<true>(arithmetic, cut.size, aligned, [&]<class T, bool exact, class Shape, bool is_aligned>() {
    launch(dgrad_kernel<T, exact, Shape, is_aligned>, grid, Shape::kThreads,
           kBackwardShared<DgradSource<T, Shape, is_aligned>, Shape>, stream, args);
  });
}

void launch_wgrad(const WgradArgs& args, const ProductCut& cut, Arithmetic arithmetic, bool aligned,
                  Stream stream) {
  const dim3 grid(static_cast<unsigned>(cut.row_tiles * cut.col_tiles), 1, static_cast<unsigned>(cut.splits));
  with_tile<true>(arithmetic, cut.size, aligned, [&]<class T, bool exact, class Shape, bool is_aligned>() {
    launch(wgrad_kernel<T, exact, Shape, is_aligned>, grid, Shape::kThreads,
           kBackwardShared<WgradSource<T, Shape, is_aligned>, Shape>, stream, args);
  });
  if (args.split_sums == nullptr) return;
  const float* sums = args.split_sums;
  int64_t splits = cut.splits;
  if (splits > kFewSplits) {
    const int64_t width = args.epilogue.rows * args.epilogue.channels;
    float* total = args.split_sums + splits * width;
    launch_add_parts(false, {sums, total, splits, splits, width}, stream);
    sums = total;
    splits = 1;
  }
  launch_split_sums(arithmetic, sums, splits, args.epilogue, stream);
}

}  // namespace fused_res::cuda
