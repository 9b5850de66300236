// Peak FMA throughput of this machine: the roofline's compute ceiling for convolutions.
#pragma once

namespace fused_res {

// Returns the FLOP/s of float32 FMAs on registers, with the active instruction set, on this many threads at
// once. Throws std::invalid_argument for more threads than PyTorch uses.
double fma_peak(int threads);

}  // namespace fused_res
