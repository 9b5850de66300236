#include "cuda/convolution.cuh"
#include "cuda/launch.h"
#include "cuda/product_dispatch.cuh"
#include "cuda/split_sums.cuh"

namespace fused_res::cuda {

void launch_convolution(const ConvolutionArgs& args, const ProductCut& cut, Arithmetic arithmetic,
                        bool aligned, Stream stream) {
  with_tile<false>(arithmetic, cut.size, aligned, [&]<class T, bool exact, class Shape, bool is_aligned>() {
    const dim3 grid(static_cast<unsigned>(cut.row_tiles * cut.col_tiles), static_cast<unsigned>(args.groups),
                    static_cast<unsigned>(cut.splits));
    launch(convolution_kernel<T, exact, Shape, is_aligned>, grid, Shape::kThreads,
           kConvolutionShared<T, Shape>, stream, args);
  });
  if (args.split_sums != nullptr)
    launch_split_sums(arithmetic, args.split_sums, cut.splits, args.epilogue, stream);
}

void launch_split_sums(Arithmetic arithmetic, const float* sums, int64_t splits, const Epilogue& epilogue,
                       Stream stream) {
  static_assert(kSplitRows == SmallTile::kRows);
  const int64_t row_tiles = ceil_div(epilogue.rows, SmallTile::kRows);
  const int64_t col_tiles = ceil_div(epilogue.channels, SmallTile::kCols);
  with_arithmetic(arithmetic, [&]<class T, bool exact>() {
    launch(split_sums_kernel<T>, dim3(static_cast<unsigned>(row_tiles * col_tiles)), SmallTile::kThreads,
           kEpilogueBytes<SmallTile>, stream, SplitSumsArgs{sums, splits, col_tiles, epilogue});
  });
}

}  // namespace fused_res::cuda
