// What the multiply-add units do when nothing else holds them up: the yardstick for products.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Two units with four or five cycles from operands to result need eight or ten; AVX2 has 16 registers.
constexpr int kChains = kFmaValues - 2;

// Multiply-adds that never leave the registers. `values`: a start for every chain, then the operands;
// what the compiler does not know, and what somebody reads, it cannot leave out.
int64_t multiply_add(int64_t rounds, float* values) {
  using V = Vec<float>;
  V chains[kChains];
  const V factor = V::all(values[kChains]), addend = V::all(values[kChains + 1]);
  for (int i = 0; i < kChains; ++i) chains[i] = V::all(values[i]);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], factor, addend);
  }
  for (int i = 0; i < kChains; ++i) values[i] = first_lane(chains[i]);
  return rounds * kChains * V::lanes * 2;
}

}  // namespace
}  // namespace fused_res::cpu
