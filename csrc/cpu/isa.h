// Which instruction set the CPU kernels run on.
#pragma once

#include <string_view>

#include "cpu/isa/kernels.h"

namespace fused_res {

// The name of the instruction set in use: "baseline", "avx2" or "avx512".
const char* cpu_isa();

// Chooses one by name; "auto" is the best that this machine runs. Throws std::invalid_argument for one it
// does not run.
void set_cpu_isa(std::string_view name);

namespace cpu {
// The kernels in use.
const Kernels& kernels();
}  // namespace cpu

}  // namespace fused_res
