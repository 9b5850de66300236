// Peak-FMA micro-benchmark: the roofline's compute ceiling for the GEMM kernels.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Independent chains of FMAs. Two FMA units with a latency of four or five cycles need eight or ten; AVX2 has
// 16 registers.
constexpr int kChains = kFmaValues - 2;

// Runs FMAs on registers and returns the number of floating-point operations. `values`: the start of every
// chain, then the two operands; the results are written back. Run-time operands and stored results keep the
// compiler from removing the loop.
int64_t fma_loop(int64_t rounds, float* values) {
  using V = Vec<float>;
  V chains[kChains];
  const V factor = V::broadcast(values[kChains]), addend = V::broadcast(values[kChains + 1]);
  for (int i = 0; i < kChains; ++i) chains[i] = V::broadcast(values[i]);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], factor, addend);
  }
  for (int i = 0; i < kChains; ++i) values[i] = first_lane(chains[i]);
  return rounds * kChains * V::lanes * 2;
}

}  // namespace
}  // namespace fused_res::cpu
