// Max pooling of act(bn(x)) or of x, forward and backward, with one-byte indices: the argument struct and the
// launches.
#pragma once

#include "cuda/kernel_args.h"

namespace fused_res::cuda {

struct MaxPoolArgs {
  bool channels_last;
  int vector_size;  // channels per access, 16 bytes of them or one; one in contiguous memory
  int64_t images, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* stats;  // A (5, C), the norm's statistics, or null: pool x itself
  bool relu;          // apply a ReLU after the norm
  const void* x;      // the input; backward: the output's gradient
  void* y;            // the output; backward: the input's gradient
  uint8_t* indices;   // of the output: position of the maximum in its window; forward output, backward input
};

void launch_max_pool_forward(Dtype dtype, const MaxPoolArgs& args, Stream stream);
void launch_max_pool_backward(Dtype dtype, const MaxPoolArgs& args, Stream stream);

}  // namespace fused_res::cuda
