#include "fibers.h"

#include <sys/mman.h>

#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(FUSED_RES_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace fused_res::cuda::sim {

namespace {

// Far more than a GPU's registers; AddressSanitizer surrounds every variable with red zones.
constexpr size_t kStackBytes = kSanitized ? 512 << 10 : 64 << 10;
// Without an offset the same variable of all threads would fall into the same set of the cache.
constexpr size_t kColours = 32, kColourBytes = 192;
// To ThreadSanitizer, who comes to a used context seems to come behind who was there before, and never races
// with them. So that threads of different blocks seldom meet like that, the one that was used least recently
// is taken, and never one of the last few: their number is prime. Others take the one that is still in the
// cache.
constexpr size_t kRest = kThreadSanitizer ? 61 : 0;

unsigned char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

}  // namespace

#if defined(__x86_64__) && !defined(FUSED_RES_SIM_UCONTEXT)

// Saves what a called function has to preserve, and changes stacks.
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

static void change_stack(Context& from, Context& to) {
  fused_res_sim_switch(&from.stack_pointer, to.stack_pointer);
}

// As if entry() had been called from nowhere and had switched away in its first instruction.
static void prepare(Context& context, unsigned char* top, void (*entry)()) {
  constexpr int kSaved = 6;
  auto* words = reinterpret_cast<void**>(top) - 1;
  *words-- = nullptr;  // entry's return address, which leaves the stack as a call does
  *words-- = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *words-- = nullptr;
  context.stack_pointer = words + 1;
}

#else

static ucontext_t* saved(Context& context) {
  if (context.stack_pointer == nullptr) context.stack_pointer = new ucontext_t;
  return static_cast<ucontext_t*>(context.stack_pointer);
}

static void change_stack(Context& from, Context& to) { swapcontext(saved(from), saved(to)); }

// The top of the stack holds what swapcontext() saves.
static void prepare(Context& context, unsigned char* top, void (*entry)()) {
  unsigned char* place = top - (sizeof(ucontext_t) + 63) / 64 * 64;
  auto* fresh = new (place) ucontext_t;
  getcontext(fresh);
  fresh->uc_stack.ss_sp = context.stack;
  fresh->uc_stack.ss_size = place - context.stack;
  fresh->uc_link = nullptr;
  makecontext(fresh, entry, 0);
  context.stack_pointer = fresh;
}

#endif

void switch_context(Context& from, Context& to, bool last) {
#ifdef FUSED_RES_SIM_THREAD_SANITIZER
  if (from.sanitizer == nullptr) from.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.sanitizer, kNoSynchronisation);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.stack_bytes);
#endif
  (void)last;
  change_stack(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void entered(Context& from) {
  (void)from;
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_bytes);
  from.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
#endif
}

Context Contexts::make() {
  const size_t bytes = kStackBytes - kColourBytes * kColours;
  Context context;
  context.stack = map_memory(kStackBytes) + kColourBytes * (made_++ % kColours);
  context.stack_bytes = bytes / 64 * 64;
#ifdef FUSED_RES_SIM_THREAD_SANITIZER
  context.sanitizer = __tsan_create_fiber(0);
#endif
  return context;
}

Context Contexts::give(void (*entry)()) {
  if (free_.size() <= kRest) free_.push_front(make());
  Context context = free_.front();
  free_.pop_front();
  prepare(context, context.stack + context.stack_bytes, entry);
  return context;
}

void Contexts::take_back(Context& context) {
  unpoison(context.stack, context.stack_bytes);  // where it was left before its end
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
