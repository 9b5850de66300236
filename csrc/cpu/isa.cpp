#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_res {
namespace {

#if defined(__x86_64__)
// Not every supported compiler version has these among the names of __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5);
}
// AMX with bfloat16, and the permission of Linux to use tile data, which is granted to the whole process and
// must be requested first. Old kernels do not know the request.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  const bool present =
      __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & 1u << 22) && (edx & 1u << 24);
  return present && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// `base` with the convolutions of bfloat16 products added.
cpu::Kernels with_bf16(const char* name, const cpu::Bf16ConvolutionKernels& bf16) {
  cpu::Kernels kernels = cpu::kernels_avx512;
  kernels.name = name;
  kernels.bf16_convolution = &bf16;
  constexpr auto kDtype = static_cast<int>(Dtype::kBFloat16);
  for (int layout = 0; layout < cpu::kLayouts; ++layout) {
    kernels.batch_norm_act[kDtype][layout] = bf16.batch_norm_act[layout];
    kernels.max_pool[kDtype][layout] = bf16.max_pool[layout];
  }
  return kernels;
}
#endif

// The kernel tables that this machine supports, best first, and then those that have to be named.
// __builtin_cpu_supports also checks that the operating system saves the registers.
const std::vector<const cpu::Kernels*>& supported_kernels() {
  static const std::vector<const cpu::Kernels*> supported = [] {
    std::vector<const cpu::Kernels*> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && has_avx512_bf16()) {
      static const cpu::Kernels amx = with_bf16("amx", cpu::bf16_kernels_amx);
      static const cpu::Kernels bf16 = with_bf16("avx512_bf16", cpu::bf16_kernels_avx512_bf16);
      if (has_amx()) found.push_back(&amx);
      found.push_back(&bf16);
    }
    if (avx512) found.push_back(&cpu::kernels_avx512);
    if (avx2) found.push_back(&cpu::kernels_avx2);
#endif
    found.push_back(&cpu::kernels_baseline);
#if defined(__x86_64__)
    if (avx512) {
      static const cpu::Kernels emulated = with_bf16("amx_emulated", cpu::bf16_kernels_amx_emulated);
      found.push_back(&emulated);
    }
#endif
    return found;
  }();
  return supported;
}

std::atomic<const cpu::Kernels*>& active_kernels() {
  static std::atomic<const cpu::Kernels*> kernels = supported_kernels().front();
  return kernels;
}

}  // namespace

const char* cpu_isa() { return cpu::kernels().name; }

void set_cpu_isa(std::string_view name) {
  const auto& available = supported_kernels();
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
