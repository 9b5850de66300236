// Run-time selection of the instruction set of the CPU kernels.
#pragma once

#include <string_view>

#include "cpu/isa/kernels.h"

namespace fused_res {

// Returns the name of the active instruction set: "baseline", "avx2", "avx512", "avx512_bf16", "amx" or, for
// tests, "amx_emulated", which has amx in plain C++.
const char* cpu_isa();

// Selects an instruction set by name; "auto" is the best one that this machine supports, never an
// emulated one. Throws
// std::invalid_argument for one that it does not support.
void set_cpu_isa(std::string_view name);

namespace cpu {
// The kernel table of the active instruction set.
const Kernels& kernels();
}  // namespace cpu

}  // namespace fused_res
