// Memory for tensors on the CPU in which a kernel's access out of bounds meets a page that must not be
// touched, and a value that nobody wrote is NaN. Part of the library with the operators, as it needs torch.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "run_time/faults.h"

namespace fused_res::cuda::sim {

namespace {

constexpr size_t kAlignment = 16;  // what kernels are promised
constexpr unsigned char kNan = 0xFF;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

class Guarded final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override { return free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  size_t list(void** pointers, size_t* sizes, size_t capacity);
  std::string describe(const void* address);

 private:
  static void free(void* pointer);

  struct Block {
    size_t bytes;
    unsigned char* mapped;
    size_t mapped_bytes;
  };
  std::mutex mutex_;
  std::map<unsigned char*, Block> blocks_;
  bool at_end_ = false;
};

Guarded& guarded() {
  static auto* allocator = new Guarded;  // never destroyed: tensors may live longer
  return *allocator;
}

c10::DataPtr Guarded::allocate(size_t bytes) {
  const c10::Device device(c10::DeviceType::CPU);
  if (bytes == 0) return {nullptr, nullptr, free, device};
  const size_t page = sysconf(_SC_PAGESIZE), used = round_up(bytes, kAlignment);
  const size_t inside = round_up(used, page), mapped_bytes = inside + 2 * page;
  void* memory = mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* mapped = static_cast<unsigned char*>(memory);
  TORCH_CHECK(mprotect(mapped + page, inside, PROT_READ | PROT_WRITE) == 0, "mprotect failed");
  std::memset(mapped + page, kNan, inside);
  const std::lock_guard lock(mutex_);
  at_end_ = !at_end_;
  unsigned char* begin = mapped + page + (at_end_ ? inside - used : 0);
  blocks_[begin] = {bytes, mapped, mapped_bytes};
  return {begin, begin, free, device};
}

void Guarded::free(void* pointer) {
  if (pointer == nullptr) return;
  Guarded& self = guarded();
  const std::lock_guard lock(self.mutex_);
  const auto block = self.blocks_.find(static_cast<unsigned char*>(pointer));
  munmap(block->second.mapped, block->second.mapped_bytes);
  self.blocks_.erase(block);
}

size_t Guarded::list(void** pointers, size_t* sizes, size_t capacity) {
  const std::lock_guard lock(mutex_);
  size_t i = 0;
  for (const auto& [begin, block] : blocks_) {
    if (i < capacity) {
      pointers[i] = begin;
      sizes[i] = block.bytes;
    }
    ++i;
  }
  return i;
}

std::string Guarded::describe(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const std::lock_guard lock(mutex_);
  for (const auto& [begin, block] : blocks_) {
    if (at < block.mapped || at >= block.mapped + block.mapped_bytes) continue;
    return ", byte " + std::to_string(at - begin) + " of a tensor of " + std::to_string(block.bytes);
  }
  return "";
}

}  // namespace

}  // namespace fused_res::cuda::sim

extern "C" {

// Tensors made from now on are guarded, or are not.
void fused_res_sim_guard(bool on) {
  using namespace fused_res::cuda::sim;
  static c10::Allocator* before = nullptr;
  if (on == (before != nullptr)) return;
  describe_address = [](const void* address) { return guarded().describe(address); };
  if (on) before = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, on ? &guarded() : std::exchange(before, nullptr));
}

// The guarded blocks that live: returns how many, of which `capacity` are written.
size_t fused_res_sim_blocks(void** pointers, size_t* sizes, size_t capacity) {
  return fused_res::cuda::sim::guarded().list(pointers, sizes, capacity);
}
}
