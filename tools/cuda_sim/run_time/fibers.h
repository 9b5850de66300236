// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <deque>

#include "sanitizers.h"

namespace fused_res::cuda::sim {

// A place where execution can go on. The scheduler's own is default constructed.
struct Context {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, AddressSanitizer's fake stack
  CopyEngine engine;
};

// Leaves `from` and goes on in `to`; returns when something switches to `from`. `last`: nothing ever will.
void switch_context(Context& from, Context& to, bool last = false);

// Gives out contexts that begin with entry(), used ones where there are some.
class Contexts {
 public:
  Context give(void (*entry)());
  void take_back(Context& context);

 private:
  Context make();

  std::deque<Context> free_;
  size_t made_ = 0;
};

// To be called first in an entry(): where it was switched from.
void entered(Context& from);

}  // namespace fused_res::cuda::sim
