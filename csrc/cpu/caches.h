// Sizes of the data caches, in terms of which the kernels' block sizes and streaming stores are chosen. Free
// of torch and of the STL's containers, like partition.h, which includes it.
#pragma once

#include <cstdint>

namespace fused_res::cpu {

struct Caches {
  int64_t l1, l2;  // bytes of one core's L1 data cache and L2
  // Bytes of the L3 that this core uses, all of it. Other cores share it, and in a virtual machine other
  // tenants' cores, which the machine does not see: it reports 2 threads for a Zen 4 chiplet of 16. So no
  // rule divides by the number of threads that share it. A rule takes a fraction of the L3 that was measured
  // to remain on a rented machine, with neighbors.
  int64_t l3;

  // True if an output of `bytes` is still in the L3 when the next layer reads it. A quarter of the L3 leaves
  // room for the operands that are read with the output, and for neighbors. Measured on both sides: 64 -> 256
  // channels of 16 images of 56x56 (51 MB) with 32 MB of L3 takes 9.8 ms with streaming stores, which bypass
  // the caches, and 13.4 ms without, because its output is evicted before it is read; with 300 MB the layers
  // of ResNet-50 take 480 to 525 ms with them and 390 to 460 ms without.
  bool keeps_in_l3(int64_t bytes) const { return bytes <= l3 / 4; }

  // True if a norm's output of `bytes` is to be written with streaming stores. With 32 MB of L3 they are
  // faster from the size of the L2 on: a normal store reads the cache line first and evicts data that the
  // second pass is about to read. Forward + backward of 3 MB takes 0.57 ms with normal stores and 0.40 ms
  // with streaming stores; in a residual block, where a convolution reads the output next, both are equal
  // from 1 to 4 MB and streaming stores are faster for larger outputs. With a large L3 the convolutions'
  // measurement above decides; nothing was measured between 32 and 300 MB.
  bool streams_norm_output(int64_t bytes) const {
    constexpr int64_t kLargeL3 = 64 << 20;
    return bytes >= l2 && (l3 < kLargeL3 || !keeps_in_l3(bytes));
  }
};

// What is assumed of a level that the machine does not report: the caches of a Zen 4 chiplet.
constexpr Caches kDefaultCaches = {32 << 10, 1 << 20, 32 << 20};

// Where each size comes from.
struct CacheSources {
  const char *l1, *l2, *l3;  // "cpuid", "sysconf", "default" or "set"
};

// The sizes in force. They are read once: from cpuid (leaf 4, on AMD 0x8000001D), else from sysconf. cpuid
// comes first because glibc's L3 is a processor's whole L3 on AMD, 320 MB, of which a core can use one
// chiplet's 32.
const Caches& caches();
CacheSources cache_sources();

// Replaces the sizes, which must be positive; null restores those of the machine. Not while kernels run.
void set_caches(const Caches* sizes);

}  // namespace fused_res::cpu
