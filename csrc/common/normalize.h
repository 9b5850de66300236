// Normalization and ReLU mask. The forward, the recomputation, the prologue of max pooling and every backward
// use these two functions with the same saved scale and shift, so that a recomputed ReLU mask is bitwise
// equal to that of the forward.
#pragma once

#include "common/statistics.h"

namespace fused_res {

// The normalized value of `centered` = x - mean. The difference of two close numbers is exact, whereas
// x * scale + (bias - mean * scale) loses log10(|mean| / standard deviation) digits. V: a scalar or a
// SIMD vector, whose `fma` is found by argument-dependent lookup.
template <class V>
FUSED_RES_INLINE V normalize(V centered, V scale, V shift) {
  return fma(centered, scale, shift);
}

// The ReLU mask is !(v <= 0): NaN propagates, forward and backward, as in PyTorch.
template <class V>
FUSED_RES_INLINE auto relu_active(V v) {
  return not_less_equal_zero(v);
}

}  // namespace fused_res
