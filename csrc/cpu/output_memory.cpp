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

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_res {
namespace {

// Smaller blocks stay with malloc, which keeps those by itself.
constexpr size_t kSmallest = 1 << 20;

struct Block {
  void* data;
  size_t bytes;
};

// For a fresh block: fewer page faults now, fewer misses of the TLB in everyone who reads the output later.
void advise_huge_pages(const Block& block) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(block.data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + block.bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // best effort
#endif
}

// Nobody waits for the lock: who does not get it goes to malloc. So a child forked while another thread held
// it lives without the cache, but lives.
class Cache {
 public:
  // A kept block of this size, the one that was used last; null if there is none.
  void* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto block = kept_.rbegin(); block != kept_.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* data = block->data;
      held_ -= bytes;
      kept_.erase(std::next(block).base());
      return data;
    }
    return nullptr;
  }

  void give(const Block& block) {
    std::vector<Block> dropped;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock || block.bytes > limit_) {
        dropped.push_back(block);
      } else {
        kept_.push_back(block);
        held_ += block.bytes;
        dropped = shrink();
      }
    }
    for (const Block& old : dropped) c10::free_cpu(old.data);
  }

  void set_limit(size_t bytes) {
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(mutex_);
      limit_ = bytes;
      dropped = shrink();
    }
    for (const Block& old : dropped) c10::free_cpu(old.data);
  }

  size_t held() {
    const std::lock_guard lock(mutex_);
    return held_;
  }

 private:
  std::vector<Block> shrink() {
    size_t count = 0;
    while (held_ > limit_) held_ -= kept_[count++].bytes;
    std::vector<Block> dropped(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(count));
    kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(count));
    return dropped;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
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
    auto block = std::make_unique<Block>(Block{cache().take(bytes), bytes});
    if (!block->data) {
      block->data = c10::alloc_cpu(bytes);
      advise_huge_pages(*block);
    }
    c10::profiledCPUMemoryReporter().New(block->data, bytes);
    void* data = block->data;
    return {data, block.release(), &release, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    cache().give(*block);
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
