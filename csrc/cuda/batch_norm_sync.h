// Helpers of the SyncBatchNorm operators: partial statistics, their merge, and partial sums of the backward,
// for whole norms and for convolutions whose epilogue computes partial statistics or sums.
#pragma once

#include "cuda/activation_tensor.h"
#include "cuda/batch_norm_act.h"

namespace fused_res::cuda {

// Merge partial statistics (P, 3, C) or (P, 4, C), float32 or float64, to (1, 3, C) of float64. The fourth
// row is the compensation term of the mean.
Tensor merge_partial_stats(const Tensor& partials, Stream stream);
// Merge partial statistics to `stats` (5, C), with one launch for up to 1024 parts.
Tensor merge_to_stats(Tensor partials, const ChannelVector& weight, const ChannelVector& bias, double eps,
                      bool is_double, Stream stream);
// Sum partial sums (P, rows, C) to (rows, C), and store the requested parameter gradients.
Tensor sum_partials(const Tensor& partials, Stream stream, const ParameterGrads& grads = {});

// The checked residual that is added before the ReLU: absent, a tensor, or a tensor with the statistics of
// its own norm.
struct Residual {
  Tensor tensor, stats;

  Residual(const ActivationTensor& x, const OptionalTensor& residual, const OptionalTensor& residual_stats);
};

// Return the data of a relu_mask of x, after checking it; null if it is absent.
const uint8_t* checked_mask(const OptionalTensor& mask, const ActivationTensor& x);

// Return the partial statistics (parts, 4, C) of a non-empty activation.
Tensor compute_partials(const ActivationTensor& x, Stream stream);
// Run both stages of the backward reduction: the sums of `args`, (args.sums_rows, C), and the requested
// parameter gradients.
Tensor compute_sums(const ActivationTensor& x, BackwardArgs args, Stream stream,
                    const ParameterGrads& grads = {});

}  // namespace fused_res::cuda
