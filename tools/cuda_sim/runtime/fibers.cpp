// Fibers: stack allocation, context switches in assembly or with ucontext, sanitizer annotations.
#include "fibers.h"

#include <sys/mman.h>

#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(FUSED_RES_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace fused_res::cuda::sim {

namespace {

// Stack size. Kernels have few local variables (a GPU thread has at most 255 registers); AddressSanitizer
// surrounds each of them with red zones.
constexpr size_t kStackBytes = kSanitized ? 512 << 10 : 64 << 10;
// Cache coloring: without an offset the same variable of all threads would map to the same cache set.
constexpr size_t kColors = 32, kColorBytes = 192;
// ThreadSanitizer sees an ordering between successive users of a context, so it misses races between them.
// Therefore, with ThreadSanitizer, the least recently freed context is reused, and at least this many stay
// free: a prime, not a multiple of a warp or block size, so that in successive blocks a context belongs to
// different threads. Otherwise the most recently freed context is reused, which is in the cache.
constexpr size_t kMinFreeContexts = kThreadSanitizer ? 61 : 0;

unsigned char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

}  // namespace

#if defined(__x86_64__) && !defined(FUSED_RES_SIM_UCONTEXT)

// Saves the callee-saved registers and switches stacks.
extern "C" void fused_res_sim_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text
.hidden fused_res_sim_switch
.globl fused_res_sim_switch
.type fused_res_sim_switch, @function
fused_res_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_res_sim_switch, . - fused_res_sim_switch
.popsection
)");

static void switch_stack(Context& from, Context& to) {
  fused_res_sim_switch(&from.stack_pointer, to.stack_pointer);
}

// Prepares a stack as if entry() had switched away in its first instruction.
static void prepare(Context& context, unsigned char* top, void (*entry)()) {
  constexpr int kSaved = 6;
  auto* words = reinterpret_cast<void**>(top) - 1;
  *words-- = nullptr;  // dummy return address: the ABI requires rsp % 16 == 8 at entry
  *words-- = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *words-- = nullptr;
  context.stack_pointer = words + 1;
}

#else

static ucontext_t* saved(Context& context) {
  if (context.stack_pointer == nullptr) context.stack_pointer = new ucontext_t;
  return static_cast<ucontext_t*>(context.stack_pointer);
}

static void switch_stack(Context& from, Context& to) { swapcontext(saved(from), saved(to)); }

// The ucontext_t is stored at the top of the stack.
static void prepare(Context& context, unsigned char* top, void (*entry)()) {
  unsigned char* address = top - (sizeof(ucontext_t) + 63) / 64 * 64;
  auto* prepared = new (address) ucontext_t;
  getcontext(prepared);
  prepared->uc_stack.ss_sp = context.stack;
  prepared->uc_stack.ss_size = address - context.stack;
  prepared->uc_link = nullptr;
  makecontext(prepared, entry, 0);
  context.stack_pointer = prepared;
}

#endif

void switch_context(Context& from, Context& to, bool last) {
#ifdef FUSED_RES_SIM_THREAD_SANITIZER
  if (from.sanitizer == nullptr) from.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.sanitizer, kNoSynchronization);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.stack_bytes);
#endif
  (void)last;
  switch_stack(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void finish_context_switch(Context& from) {
  (void)from;
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_bytes);
  from.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
#endif
}

Context ContextPool::make() {
  const size_t bytes = kStackBytes - kColorBytes * kColors;
  Context context;
  context.stack = map_memory(kStackBytes) + kColorBytes * (made_++ % kColors);
  context.stack_bytes = bytes / 64 * 64;
#ifdef FUSED_RES_SIM_THREAD_SANITIZER
  context.sanitizer = __tsan_create_fiber(0);
#endif
  return context;
}

Context ContextPool::allocate(void (*entry)()) {
  if (free_.size() <= kMinFreeContexts) free_.push_front(make());
  Context context = free_.front();
  free_.pop_front();
  prepare(context, context.stack + context.stack_bytes, entry);
  return context;
}

void ContextPool::recycle(Context& context) {
  unpoison(context.stack, context.stack_bytes);  // an aborted thread leaves poisoned frames
#ifdef __SANITIZE_ADDRESS__
  context.sanitizer = nullptr;
#endif
  if (kThreadSanitizer)
    free_.push_back(context);
  else
    free_.push_front(context);
  context = {};
}

}  // namespace fused_res::cuda::sim
