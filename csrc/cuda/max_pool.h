// Max pooling of act(bn(x)) or of x, with indices of one byte.
#pragma once

#include "cuda/operands.h"

namespace fused_res::cuda {

struct MaxPoolArgs {
  bool channels_last;
  int vector;  // elements of an access: channels, 16 bytes of them or one; one in contiguous memory
  int64_t images, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* stats;  // A (5, C), or null: the values as they are
  bool relu;          // behind the norm
  const void* x;      // the input; backward: the output's gradient
  void* y;            // the output; backward: the input's gradient
  uint8_t* indices;   // of the output: which value of the window it is; written, or read
};

void launch_max_pool_forward(Dtype dtype, const MaxPoolArgs& args, Stream stream);
void launch_max_pool_backward(Dtype dtype, const MaxPoolArgs& args, Stream stream);

}  // namespace fused_res::cuda
