#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_res {
namespace {

#if defined(__x86_64__)
// Not every supported compiler version has F16C among the names of __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// The kernel tables that this machine supports, best first. __builtin_cpu_supports also checks that the
// operating system saves the registers.
std::vector<const cpu::Kernels*> supported_kernels() {
  std::vector<const cpu::Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&cpu::kernels_avx512);
  }
  if (avx2) found.push_back(&cpu::kernels_avx2);
#endif
  found.push_back(&cpu::kernels_baseline);
  return found;
}

std::atomic<const cpu::Kernels*>& active_kernels() {
  static std::atomic<const cpu::Kernels*> kernels = supported_kernels().front();
  return kernels;
}

}  // namespace

const char* cpu_isa() { return cpu::kernels().name; }

void set_cpu_isa(std::string_view name) {
  const auto available = supported_kernels();
  if (name == "auto") {
    active_kernels() = available.front();
    return;
  }
  std::string names = "auto";
  for (const cpu::Kernels* kernels : available) {
    if (name == kernels->name) {
      active_kernels() = kernels;
      return;
    }
    names += std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("cannot run the CPU kernels on instruction set '" + std::string(name) +
                              "': this machine and build offer " + names);
}

const cpu::Kernels& cpu::kernels() { return *active_kernels().load(std::memory_order_relaxed); }

}  // namespace fused_res
