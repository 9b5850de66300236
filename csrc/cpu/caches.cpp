#include "cpu/caches.h"

#include <unistd.h>

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_res::cpu {
namespace {

struct Detected {
  Caches sizes;
  CacheSources sources;
};

#if defined(__x86_64__)
// Bytes of the data or unified cache of this level; 0 if cpuid does not report it. Leaf 4 (Intel SDM, volume
// 2) and leaf 0x8000001D (AMD APM, volume 3) have the same layout; each vendor leaves the other's empty.
int64_t cpuid_cache(unsigned level) {
  for (const unsigned leaf : {0x4u, 0x8000001Du}) {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kMaxCaches = 16, kInstructionCache = 2;
    for (unsigned index = 0; index < kMaxCaches && __get_cpuid_count(leaf, index, &eax, &ebx, &ecx, &edx);
         ++index) {
      const unsigned type = eax & 31;
      if (type == 0) break;
      if (type == kInstructionCache || (eax >> 5 & 7) != level) continue;
      const int64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 1023) + 1, line = (ebx & 4095) + 1,
                    sets = int64_t{ecx} + 1;
      return ways * partitions * line * sets;
    }
  }
  return 0;
}
#else
int64_t cpuid_cache(unsigned) { return 0; }
#endif

int64_t sysconf_cache([[maybe_unused]] unsigned level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)  // glibc's
  constexpr int kNames[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  return sysconf(kNames[level - 1]);  // 0 or -1 if it is unknown
#else
  return 0;
#endif
}

const char* detect_level(unsigned level, int64_t fallback, int64_t& bytes) {
  if ((bytes = cpuid_cache(level)) > 0) return "cpuid";
  if ((bytes = sysconf_cache(level)) > 0) return "sysconf";
  bytes = fallback;
  return "default";
}

const Detected& detected() {
  static const Detected found = [] {
    Detected d = {};
    d.sources.l1 = detect_level(1, kDefaultCaches.l1, d.sizes.l1);
    d.sources.l2 = detect_level(2, kDefaultCaches.l2, d.sizes.l2);
    d.sources.l3 = detect_level(3, kDefaultCaches.l3, d.sizes.l3);
    return d;
  }();
  return found;
}

// The sizes that were set; null for those of the machine.
std::atomic<const Caches*> override_sizes = nullptr;

}  // namespace

const Caches& caches() {
  const Caches* sizes = override_sizes.load(std::memory_order_acquire);
  return sizes ? *sizes : detected().sizes;
}

CacheSources cache_sources() {
  return override_sizes.load(std::memory_order_acquire) ? CacheSources{"set", "set", "set"}
                                                        : detected().sources;
}

void set_caches(const Caches* sizes) {
  // Not freed: another thread may hold a reference, and only a process's start and tests set the sizes.
  override_sizes.store(sizes ? new Caches(*sizes) : nullptr, std::memory_order_release);
}

}  // namespace fused_res::cpu
