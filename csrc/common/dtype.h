// Element types of the kernels of all backends, for host and device code.
#pragma once

namespace fused_res {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fused_res
