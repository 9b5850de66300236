// Memory layout of a tensor (N, C, ...) in the kernels of all backends.
#pragma once

namespace fused_res {

enum class Layout { kNhwc, kNchw };  // rows of channels; planes, one for each channel

}  // namespace fused_res
