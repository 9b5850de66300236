// A block's shared memory, and copies to it.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "machine.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

namespace {

constexpr size_t kMargin = 128;  // a multiple of the alignment
constexpr size_t kCopyBytes = 16;
constexpr unsigned char kNan = 0xFF;  // in every type, repeated

}  // namespace

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes), mapped_bytes_(bytes + 2 * kMargin) {
  // Not malloc(): ThreadSanitizer forgets what happened in memory before it was mapped.
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<unsigned char*>(memory);
  begin = mapped_ + kMargin;
}

SharedMemory::~SharedMemory() {
  unpoison(mapped_, mapped_bytes_);
  munmap(mapped_, mapped_bytes_);
}

void SharedMemory::clear() {
  unpoison(mapped_, mapped_bytes_);
  std::memset(mapped_, kNan, mapped_bytes_);
  poison(mapped_, kMargin);
  poison(begin + bytes_, kMargin);
}

bool SharedMemory::overrun() const {
  if (kSanitized) return false;
  unsigned char untouched[kMargin];
  std::memset(untouched, kNan, kMargin);
  return std::memcmp(mapped_, untouched, kMargin) != 0 ||
         std::memcmp(begin + bytes_, untouched, kMargin) != 0;
}

unsigned char* shared_memory() { return current->block->shared; }

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - current->block->shared);
}

unsigned char* shared_at(uint32_t address, size_t bytes, const char* what) {
  const Block& block = *current->block;
  if (address % bytes != 0 || address + bytes > block.shared_bytes) {
    fail(std::string(what) + " at " + std::to_string(static_cast<int32_t>(address)) +
         " in shared memory of " + std::to_string(block.shared_bytes) + " bytes" +
         (address % bytes != 0 ? ", misaligned" : ""));
  }
  return block.shared + address;
}

// --- cp.async
// -----------------------------------------------------------------------------------------------

namespace {

Copies& copies() {
  if (current->copies == nullptr) {
    // With the flags of stacks, beside which it comes to lie: other flags would make each a mapping of its
    // own, of which the kernel has 65530 for a process.
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, sizeof(Copies), PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    current->copies = static_cast<Copies*>(memory);  // kept: threads are used again
  }
  return *current->copies;
}

void arrive(const Copy& copy) {
  unsigned char* shared = current->block->shared + copy.shared;
  for (unsigned i = 0; i < kCopyBytes; ++i)
    shared[i] = i < copy.bytes ? static_cast<const unsigned char*>(copy.global)[i] : 0;
}

}  // namespace

void copy_async(uint32_t shared, const void* global, int bytes) {
  Thread& thread = *current;
  unsigned char* place = shared_at(shared, kCopyBytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) fail("cp.async from a misaligned address");
  if (thread.issued - thread.arrived == Copies::kMost) fail("more copies than the simulator can hold");
  Copies& all = copies();
  all.copy[thread.issued++ % Copies::kMost] = {global, shared, static_cast<uint32_t>(bytes)};
  std::memset(place, kNan, kCopyBytes);
  thread.context.engine.copy(place, kCopyBytes, global, bytes, thread.committed % Copies::kMostGroups,
                             __builtin_return_address(0));
}

void copy_async_commit() {
  Thread& thread = *current;
  if (thread.committed - thread.groups_arrived == Copies::kMostGroups)
    fail("more groups of copies than the simulator can hold");
  copies().groups[thread.committed++ % Copies::kMostGroups] = thread.issued;
}

void copy_async_wait(int groups) {
  Thread& thread = *current;
  for (; thread.groups_arrived + groups < thread.committed; ++thread.groups_arrived) {
    const Copies& all = *thread.copies;
    const uint64_t group = thread.groups_arrived % Copies::kMostGroups;
    while (thread.arrived < all.groups[group]) arrive(all.copy[thread.arrived++ % Copies::kMost]);
    thread.context.engine.wait(group);
  }
}

}  // namespace fused_res::cuda::sim
