// Caching allocator for large outputs.
//
// glibc returns blocks of 32 MB and more (initially of 128 KB) to the operating system as soon as they are
// freed, and the next output takes a page fault for every page again: a ReLU of 51 MB takes 17 ms that way,
// and 3 ms if it writes to memory that is already mapped. With huge pages the 17 ms become 5 ms, or 80 ms,
// depending on whether the hypervisor still holds the pages. Freed outputs are therefore cached and reused
// for outputs of exactly the same size: training steps allocate the same sizes over and over, and there is no
// fragmentation. Other allocations of the process are not affected. The cache holds no more than a limit, and
// not much more than the outputs that were alive at once: as much as a step frees, however large the model
// is, and not a block of every size that a process has ever used.
#include "cpu/output_allocator.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_res {
namespace {

// Smaller blocks are left to malloc, which caches them itself; glibc returns larger ones to the operating
// system as long as a process has freed no larger block yet.
constexpr size_t kMinBlockBytes = 128 << 10;
// The cache may hold as much beyond the outputs that were alive at once: a step also uses other sizes, one
// after the other. Blocks beyond it would be evicted and mapped again in every step.
constexpr size_t kSurplus = 256 << 20;

// A header before the data stores the block's size, so that the data pointer alone identifies a block, as
// PyTorch's copy-on-write requires. It is as long as a cache line, so that the data is aligned.
constexpr size_t kHeader = 64;

size_t& block_bytes(void* data) { return *reinterpret_cast<size_t*>(static_cast<char*>(data) - kHeader); }

void* allocate_block(size_t bytes) {
  void* data = static_cast<char*>(c10::alloc_cpu(bytes + kHeader)) + kHeader;
  block_bytes(data) = bytes;
  cpu::advise_huge_pages(data, bytes);
  return data;
}

void free(void* data) { c10::free_cpu(static_cast<char*>(data) - kHeader); }

// A cache of free blocks. acquire_block() and release_block() never wait for the lock: without it, they fall
// back to malloc and free. So in a child that was forked while another thread held the lock, the cache is
// unused but nothing deadlocks.
class BlockCache {
 public:
  // Returns a cached block of exactly this size, the most recently used one; null if there is none.
  void* acquire_block(size_t bytes) {
    const size_t live = live_bytes_.fetch_add(bytes) + bytes;
    for (size_t peak = peak_bytes_; live > peak && !peak_bytes_.compare_exchange_weak(peak, live);) {
    }
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(free_blocks_.rbegin(), free_blocks_.rend(),
                                    [=](void* data) { return block_bytes(data) == bytes; });
    if (found == free_blocks_.rend()) return nullptr;
    void* data = *found;
    free_blocks_.erase(std::next(found).base());
    cached_bytes_ -= bytes;
    return data;
  }

  void release_block(void* data) {
    const size_t bytes = block_bytes(data);
    live_bytes_ -= bytes;
    std::vector<void*> evicted;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock || bytes > limit_) {
        evicted.push_back(data);
      } else {
        free_blocks_.push_back(data);
        cached_bytes_ += bytes;
        evicted = shrink();
      }
    }
    for (void* old : evicted) free(old);
  }

  void set_limit(size_t bytes) {
    std::vector<void*> evicted;
    {
      const std::lock_guard lock(mutex_);
      limit_ = bytes;
      evicted = shrink();
    }
    for (void* old : evicted) free(old);
  }

  size_t cached_bytes() {
    const std::lock_guard lock(mutex_);
    return cached_bytes_;
  }

 private:
  // Removes the oldest blocks until the capacity holds, and returns them.
  std::vector<void*> shrink() {
    const size_t capacity = std::min(limit_, kSurplus + peak_bytes_);
    auto end = free_blocks_.begin();
    while (cached_bytes_ > capacity) cached_bytes_ -= block_bytes(*end++);
    std::vector<void*> evicted(free_blocks_.begin(), end);
    free_blocks_.erase(free_blocks_.begin(), end);
    return evicted;
  }

  std::mutex mutex_;
  std::vector<void*> free_blocks_;  // oldest first
  size_t cached_bytes_ = 0;
  size_t limit_ = 0;
  std::atomic<size_t> live_bytes_ = 0, peak_bytes_ = 0;
};

BlockCache& cache() {
  static BlockCache* const cache = new BlockCache;  // never destroyed
  return *cache;
}

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kMinBlockBytes) return c10::GetCPUAllocator()->allocate(bytes);
    void* data = cache().acquire_block(bytes);
    if (!data) data = allocate_block(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    cache().release_block(data);
  }
};

}  // namespace

void set_output_cache(size_t bytes) { cache().set_limit(bytes); }
size_t output_cache_bytes() { return cache().cached_bytes(); }

namespace cpu {
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // best effort
#endif
}

c10::Allocator* output_allocator() {
  static OutputAllocator* const allocator = new OutputAllocator;  // never destroyed
  return allocator;
}
}  // namespace cpu

}  // namespace fused_res
