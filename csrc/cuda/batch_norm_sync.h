// The halves of a norm, for whole norms and for convolutions that bring statistics or sums of their own.
#pragma once

#include "cuda/activation.h"
#include "cuda/batch_norm_act.h"

namespace fused_res::cuda {

// (P, 3, C) or (P, 4, C), the fourth row being what rounding took from the mean, of float or double, to
// (1, 3, C) of double.
Tensor merge_parts(const Tensor& partials, Stream stream);
// To stats, from one launch for up to 1024 parts.
Tensor merge_to_stats(Tensor partials, const ChannelVector& weight, const ChannelVector& bias, double eps,
                      bool is_double, Stream stream);
// (P, rows, C) to (rows, C).
Tensor merge_sums(const Tensor& partials, Stream stream);

// What is added in front of the ReLU: nothing, a tensor as it is, or one that is normalised with statistics
// of its own.
struct Residual {
  Tensor tensor, stats;

  Residual(const Operand& x, const OptionalTensor& residual, const OptionalTensor& residual_stats);
};

const uint8_t* checked_mask(const OptionalTensor& mask, const Operand& x);

// (parts, 4, C) of one pass over an activation that is not empty.
Tensor tile_partials(const Operand& x, Stream stream);
// Stages one and two of the sums that `args` asks for.
Tensor compute_sums(const Operand& x, BackwardArgs args, Stream stream);

}  // namespace fused_res::cuda
