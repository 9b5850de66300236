// Memory layout of a tensor (N, C, ...) in the kernels of all backends.
#pragma once

namespace fused_res {

enum class Layout { kNhwc, kNchw };  // channels_last; contiguous

}  // namespace fused_res
