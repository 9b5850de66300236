// Output size of convolutions and poolings, for the host code of all backends.
#pragma once

#include <cstdint>

namespace fused_res {

// The output size in one dimension; 0 if the dilated window is larger than the padded input.
inline int64_t output_size(int64_t size, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = size + 2 * pad - dilation * (taps - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace fused_res
