// Launches of the max pooling kernels.
#include "cuda/dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/max_pool.cuh"

namespace fused_res::cuda {
namespace {

dim3 grid_for(const MaxPoolArgs& args, int64_t pixels) {
  const int64_t accesses = args.images * args.channels * pixels / args.vector_size;
  return checked_grid(ceil_div(accesses, kThreads));
}

}  // namespace

void launch_max_pool_forward(Dtype dtype, const MaxPoolArgs& args, Stream stream) {
  dispatch_vector_size(dtype, args.vector_size, [&]<class T, int n>() {
    launch(max_pool_forward_kernel<T, n>, grid_for(args, args.out_height * args.out_width), kThreads, 0,
           stream, args);
  });
}

void launch_max_pool_backward(Dtype dtype, const MaxPoolArgs& args, Stream stream) {
  dispatch_vector_size(dtype, args.vector_size, [&]<class T, int n>() {
    launch(max_pool_backward_kernel<T, n>, grid_for(args, args.height * args.width), kThreads, 0, stream,
           args);
  });
}

}  // namespace fused_res::cuda
