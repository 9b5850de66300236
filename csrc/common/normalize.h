// The one normalise. Forward, recomputation, the pooling's prologue and every backward go through these two
// functions, from the same saved scale and shift: then a recomputed ReLU agrees with the forward one in every
// bit.
#pragma once

#include "common/statistics.h"

namespace fused_res {

// `centred` is x - mean: the difference of two close numbers is exact, where x * scale + (bias - mean *
// scale) loses as many digits as the mean is larger than the deviation. V: a scalar, or a vector of lanes;
// `fma` is found beside it.
template <class V>
FUSED_RES_INLINE V normalize(V centred, V scale, V shift) {
  return fma(centred, scale, shift);
}

// The mask of ReLU is !(v <= 0): NaN passes through, forward and backward, as in PyTorch.
template <class V>
FUSED_RES_INLINE auto relu_active(V v) {
  return not_less_equal_zero(v);
}

}  // namespace fused_res
