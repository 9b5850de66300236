// Activations of a batch norm's elementwise pass, in the kernels of all backends; for host and device code.
#pragma once

namespace fused_res {

// In the order of fused_res.ops.checks.ACTIVATIONS.
enum class Activation { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu };

}  // namespace fused_res
