// Shared memory of a block, and cp.async.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "execution_state.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

namespace {

constexpr size_t kMargin = 128;  // a multiple of the alignment
constexpr size_t kCopyBytes = 16;
constexpr unsigned char kNanByte = 0xFF;  // this byte repeated is NaN in every floating-point type

}  // namespace

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes), mapped_bytes_(bytes + 2 * kMargin) {
  // mmap() instead of malloc(): ThreadSanitizer forgets earlier accesses to memory when it is mapped.
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
  std::memset(mapped_, kNanByte, mapped_bytes_);
  poison(mapped_, kMargin);
  poison(begin + bytes_, kMargin);
}

bool SharedMemory::overrun() const {
  if (kSanitized) return false;
  unsigned char intact[kMargin];
  std::memset(intact, kNanByte, kMargin);
  return std::memcmp(mapped_, intact, kMargin) != 0 || std::memcmp(begin + bytes_, intact, kMargin) != 0;
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
         (address % bytes != 0 ? ", misaligned" : ", out of bounds"));
  }
  return block.shared + address;
}

// --- cp.async ---

namespace {

CopyQueue& copy_queue() {
  if (current->copy_queue == nullptr) {
    // The same flags as the stacks of the fibers, so that Linux merges adjacent mappings: a process may have
    // at most 65530.
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, sizeof(CopyQueue), PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    current->copy_queue = static_cast<CopyQueue*>(memory);  // not freed: Thread objects are reused
  }
  return *current->copy_queue;
}

void complete_copy(const AsyncCopy& copy) {
  unsigned char* shared = current->block->shared + copy.shared;
  for (unsigned i = 0; i < kCopyBytes; ++i)
    shared[i] = i < copy.bytes ? static_cast<const unsigned char*>(copy.global)[i] : 0;
}

}  // namespace

void cp_async(uint32_t shared, const void* global, int bytes) {
  Thread& thread = *current;
  unsigned char* destination = shared_at(shared, kCopyBytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) fail("cp.async from a misaligned address");
  if (thread.copies_issued - thread.copies_completed == CopyQueue::kCapacity)
    fail("more cp.async in flight than the simulator supports");
  CopyQueue& queue = copy_queue();
  queue.copy[thread.copies_issued++ % CopyQueue::kCapacity] = {global, shared, static_cast<uint32_t>(bytes)};
  std::memset(destination, kNanByte, kCopyBytes);
  thread.context.engine.copy(destination, kCopyBytes, global, bytes,
                             thread.groups_committed % CopyQueue::kMaxGroups, __builtin_return_address(0));
}

void cp_async_commit_group() {
  Thread& thread = *current;
  if (thread.groups_committed - thread.groups_completed == CopyQueue::kMaxGroups)
    fail("more cp.async groups in flight than the simulator supports");
  copy_queue().groups[thread.groups_committed++ % CopyQueue::kMaxGroups] = thread.copies_issued;
}

void cp_async_wait_group(int groups) {
  Thread& thread = *current;
  for (; thread.groups_completed + groups < thread.groups_committed; ++thread.groups_completed) {
    const CopyQueue& queue = *thread.copy_queue;
    const uint64_t group = thread.groups_completed % CopyQueue::kMaxGroups;
    while (thread.copies_completed < queue.groups[group])
      complete_copy(queue.copy[thread.copies_completed++ % CopyQueue::kCapacity]);
    thread.context.engine.wait(group);
  }
}

}  // namespace fused_res::cuda::sim
