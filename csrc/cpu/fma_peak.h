// The most arithmetic that this machine does: the yardstick for convolutions.
#pragma once

namespace fused_res {

// FLOP/s of float32 multiply-adds in registers, in the instruction set in use, on this many threads at once.
// Throws std::invalid_argument for more threads than PyTorch has.
double fma_peak(int threads);

}  // namespace fused_res
