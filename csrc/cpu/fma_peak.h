// Peak throughput of this machine: the roofline's compute ceilings for convolutions.
#pragma once

namespace fused_res {

// Return the FLOP/s of float32 FMAs, and of products of bfloat16 accumulated in float32, on registers, with
// the active instruction set, on this many threads at once. Throw std::invalid_argument for more threads than
// PyTorch uses, bf16_peak() also std::runtime_error without avx512_bf16 or amx.
double fma_peak(int threads);
double bf16_peak(int threads);

}  // namespace fused_res
