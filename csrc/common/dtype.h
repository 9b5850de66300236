// The element types that kernels know, for host and device sides alike.
#pragma once

namespace fused_res {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fused_res
