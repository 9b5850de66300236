// A small cache of large blocks between the outputs and malloc.
//
// glibc hands blocks of 32 MB and more (at first, of 128 KB) back to the kernel as soon as they are freed,
// and the next output pays for every page again: a ReLU of 51 MB takes 17 ms that way and 3 ms into memory
// that is there. Huge pages make 5 of the 17, or 80, depending on whether the hypervisor still has the pages.
// So freed outputs are kept, up to a limit, and only ever given to outputs of the same size: a training step
// asks for the same sizes again and again, and no memory is lost to fragments. Nothing is changed for anyone
// else's memory.
#include "cpu/output_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_res {
namespace {

// Smaller blocks stay with malloc, which keeps those by itself.
constexpr size_t kSmallest = 1 << 20;

// In front of the data, so that the data pointer is all there is to know (PyTorch's copy-on-write asks for
// that); as long as a cache line, so that the data stays aligned.
constexpr size_t kHeader = 64;

size_t& bytes_of(void* data) { return *reinterpret_cast<size_t*>(static_cast<char*>(data) - kHeader); }

// Fewer page faults now, fewer misses of the TLB in everyone who reads the output later.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // best effort
#endif
}

void* fresh(size_t bytes) {
  void* data = static_cast<char*>(c10::alloc_cpu(bytes + kHeader)) + kHeader;
  bytes_of(data) = bytes;
  advise_huge_pages(data, bytes);
  return data;
}

void free(void* data) { c10::free_cpu(static_cast<char*>(data) - kHeader); }

// Nobody waits for the lock: who does not get it goes to malloc. So a child forked while another thread held
// it lives without the cache, but lives.
class Cache {
 public:
  // Kept data of this size, the one that was used last; null if there is none.
  void* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found =
        std::find_if(kept_.rbegin(), kept_.rend(), [=](void* data) { return bytes_of(data) == bytes; });
    if (found == kept_.rend()) return nullptr;
    void* data = *found;
    kept_.erase(std::next(found).base());
    held_ -= bytes;
    return data;
  }

  void give(void* data) {
    const size_t bytes = bytes_of(data);
    std::vector<void*> dropped;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock || bytes > limit_) {
        dropped.push_back(data);
      } else {
        kept_.push_back(data);
        held_ += bytes;
        dropped = shrink();
      }
    }
    for (void* old : dropped) free(old);
  }

  void set_limit(size_t bytes) {
    std::vector<void*> dropped;
    {
      const std::lock_guard lock(mutex_);
      limit_ = bytes;
      dropped = shrink();
    }
    for (void* old : dropped) free(old);
  }

  size_t held() {
    const std::lock_guard lock(mutex_);
    return held_;
  }

 private:
  // Takes out the oldest until the limit holds.
  std::vector<void*> shrink() {
    auto end = kept_.begin();
    while (held_ > limit_) held_ -= bytes_of(*end++);
    std::vector<void*> dropped(kept_.begin(), end);
    kept_.erase(kept_.begin(), end);
    return dropped;
  }

  std::mutex mutex_;
  std::vector<void*> kept_;  // the oldest first
  size_t held_ = 0;
  size_t limit_ = 0;
};

Cache& cache() {
  static Cache* const cache = new Cache;  // never destroyed
  return *cache;
}

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetCPUAllocator()->allocate(bytes);
    void* data = cache().take(bytes);
    if (!data) data = fresh(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    cache().give(data);
  }
};

}  // namespace

void set_output_cache(size_t bytes) { cache().set_limit(bytes); }
size_t output_cache_bytes() { return cache().held(); }

namespace cpu {
c10::Allocator* output_allocator() {
  static OutputAllocator* const allocator = new OutputAllocator;  // never destroyed
  return allocator;
}
}  // namespace cpu

}  // namespace fused_res
