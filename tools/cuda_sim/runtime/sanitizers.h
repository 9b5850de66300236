// Annotations for AddressSanitizer and ThreadSanitizer of fibers, of barriers and of the runtime's accesses
// on behalf of kernels. Without a sanitizer all of them are empty.
//
// The runtime is compiled without -fsanitize=thread, because its own accesses are not those of a simulated
// thread. FUSED_RES_SIM_THREAD_SANITIZER therefore replaces the compiler's macro.
#pragma once

#include <cstddef>

#ifdef FUSED_RES_SIM_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range_pc(void* address, size_t size, void* pc);
void __tsan_write_range_pc(void* address, size_t size, void* pc);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fused_res::cuda::sim {

#if defined(FUSED_RES_SIM_THREAD_SANITIZER) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#ifdef FUSED_RES_SIM_THREAD_SANITIZER
constexpr bool kThreadSanitizer = true;
constexpr unsigned kNoSynchronization = 1;  // a fiber switch does not order memory
// A happens-before edge from every release() to the following acquire() of the same address.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }
// Records a read by the kernel's code at `code`.
inline void note_read(const void* at, size_t bytes, void* code) {
  __tsan_read_range_pc(const_cast<void*>(at), bytes, code);
}

// The asynchronous copies of a thread. A copy can happen at any time from its issue to the wait, and is
// visible to the thread only after the wait. So it is modelled as an access of another fiber that happens
// after the issue and before the wait.
class CopyEngine {
 public:
  void copy(void* to, size_t bytes, const void* from, size_t bytes_read, size_t group, void* code) {
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    void* thread = __tsan_get_current_fiber();
    __tsan_release(fiber_);
    __tsan_switch_to_fiber(fiber_, kNoSynchronization);
    __tsan_acquire(fiber_);
    __tsan_write_range_pc(to, bytes, code);
    if (bytes_read != 0) __tsan_read_range_pc(const_cast<void*>(from), bytes_read, code);
    __tsan_release(token(group));
    __tsan_switch_to_fiber(thread, kNoSynchronization);
  }
  void wait(size_t group) {
    if (fiber_ != nullptr) __tsan_acquire(token(group));
  }

 private:
  // Addresses that are used for no other annotation.
  void* token(size_t group) const { return static_cast<char*>(fiber_) + 1 + group; }

  void* fiber_ = nullptr;
};
#else
constexpr bool kThreadSanitizer = false;
inline void release(void*) {}
inline void acquire(void*) {}
inline void note_read(const void*, size_t, void*) {}
struct CopyEngine {
  void copy(void*, size_t, const void*, size_t, size_t, void*) {}
  void wait(size_t) {}
};
#endif

#ifdef __SANITIZE_ADDRESS__
inline void poison(void* at, size_t bytes) { ASAN_POISON_MEMORY_REGION(at, bytes); }
inline void unpoison(void* at, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(at, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

}  // namespace fused_res::cuda::sim
