// A CPU allocator for tensors with guard pages (PROT_NONE) before and after each allocation, which turn
// out-of-bounds accesses of kernels into faults, and with memory initialized with NaN. Part of the library
// with the operators, because it needs torch.
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

#include "runtime/fault_handler.h"

namespace fused_res::cuda::sim {

namespace {

constexpr size_t kAlignment = 16;         // alignment that kernels require
constexpr unsigned char kNanByte = 0xFF;  // this byte repeated is NaN in every floating-point type

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Alternately places an allocation directly before the upper and directly after the lower guard page.
class GuardedAllocator final : public c10::Allocator {
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

  struct Allocation {
    size_t bytes;
    unsigned char* mapped;
    size_t mapped_bytes;
  };
  std::mutex mutex_;
  std::map<unsigned char*, Allocation> allocations_;
  bool before_upper_guard_ = false;
};

GuardedAllocator& guarded_allocator() {
  static auto* allocator = new GuardedAllocator;  // never destroyed: tensors may outlive static objects
  return *allocator;
}

c10::DataPtr GuardedAllocator::allocate(size_t bytes) {
  const c10::Device device(c10::DeviceType::CPU);
  if (bytes == 0) return {nullptr, nullptr, free, device};
  const size_t page = sysconf(_SC_PAGESIZE), padded_bytes = round_up(bytes, kAlignment);
  const size_t accessible_bytes = round_up(padded_bytes, page), mapped_bytes = accessible_bytes + 2 * page;
  void* memory = mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* mapped = static_cast<unsigned char*>(memory);
  TORCH_CHECK(mprotect(mapped + page, accessible_bytes, PROT_READ | PROT_WRITE) == 0, "mprotect failed");
  std::memset(mapped + page, kNanByte, accessible_bytes);
  const std::lock_guard lock(mutex_);
  before_upper_guard_ = !before_upper_guard_;
  unsigned char* begin = mapped + page + (before_upper_guard_ ? accessible_bytes - padded_bytes : 0);
  allocations_[begin] = {bytes, mapped, mapped_bytes};
  return {begin, begin, free, device};
}

void GuardedAllocator::free(void* pointer) {
  if (pointer == nullptr) return;
  GuardedAllocator& self = guarded_allocator();
  const std::lock_guard lock(self.mutex_);
  const auto allocation = self.allocations_.find(static_cast<unsigned char*>(pointer));
  munmap(allocation->second.mapped, allocation->second.mapped_bytes);
  self.allocations_.erase(allocation);
}

size_t GuardedAllocator::list(void** pointers, size_t* sizes, size_t capacity) {
  const std::lock_guard lock(mutex_);
  size_t i = 0;
  for (const auto& [begin, allocation] : allocations_) {
    if (i < capacity) {
      pointers[i] = begin;
      sizes[i] = allocation.bytes;
    }
    ++i;
  }
  return i;
}

std::string GuardedAllocator::describe(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const std::lock_guard lock(mutex_);
  for (const auto& [begin, allocation] : allocations_) {
    if (at < allocation.mapped || at >= allocation.mapped + allocation.mapped_bytes) continue;
    return ", byte " + std::to_string(at - begin) + " of a tensor of " + std::to_string(allocation.bytes) +
           " bytes";
  }
  return "";
}

}  // namespace

}  // namespace fused_res::cuda::sim

extern "C" {

// Makes the guarded allocator PyTorch's CPU allocator, or restores the previous one.
void fused_res_sim_guard_allocations(bool on) {
  using namespace fused_res::cuda::sim;
  static c10::Allocator* previous = nullptr;
  if (on == (previous != nullptr)) return;
  describe_address = [](const void* address) { return guarded_allocator().describe(address); };
  if (on) previous = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, on ? &guarded_allocator() : std::exchange(previous, nullptr));
}

// Lists the live guarded allocations: returns their number and writes at most `capacity` of them.
size_t fused_res_sim_allocations(void** pointers, size_t* sizes, size_t capacity) {
  return fused_res::cuda::sim::guarded_allocator().list(pointers, sizes, capacity);
}
}
