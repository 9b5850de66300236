// How the host sides of all backends see a tensor in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace fused_res {

inline at::MemoryFormat channels_last_of(int64_t dim) {
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// Whether kernels see rows of channels. The same rule as fused_res.ops.is_channels_last.
inline bool is_channels_last(const at::Tensor& input) {
  if (input.dim() == 2) return true;
  if (input.size(1) == 1) return false;
  if (std::all_of(input.sizes().begin() + 2, input.sizes().end(), [](int64_t size) { return size == 1; }))
    return true;
  return input.dim() > 3 && !input.is_contiguous() && input.is_contiguous(channels_last_of(input.dim()));
}

// `input` in channels_last memory, or contiguous; itself if it is already.
inline at::Tensor laid_out(const at::Tensor& input, bool channels_last) {
  const bool has_rows = channels_last && input.dim() > 3;
  return input.contiguous(has_rows ? channels_last_of(input.dim()) : at::MemoryFormat::Contiguous);
}

}  // namespace fused_res
