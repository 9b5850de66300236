// Fibers: stacks, and context switches between them.
#pragma once

#include <cstddef>
#include <deque>

#include "sanitizers.h"

namespace fused_res::cuda::sim {

// A suspended execution. The scheduler's own context is default constructed.
struct Context {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, AddressSanitizer's fake stack
  CopyEngine engine;
};

// Suspends `from` and resumes `to`; returns when something switches back to `from`. `last`: nothing will.
void switch_context(Context& from, Context& to, bool last = false);

// A pool of contexts that start in entry().
class ContextPool {
 public:
  Context allocate(void (*entry)());
  void recycle(Context& context);

 private:
  Context make();

  std::deque<Context> free_;
  size_t made_ = 0;
};

// Completes the switch to a new context for AddressSanitizer. The first call of an entry(); `from` is the
// context that was switched from.
void finish_context_switch(Context& from);

}  // namespace fused_res::cuda::sim
