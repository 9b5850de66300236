#include "faults.h"

#include <ucontext.h>

#include <cstdint>
#include <cstdio>

#include "machine.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

std::string (*describe_address)(const void*) = nullptr;

#ifdef __x86_64__

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
const void* touched;

[[noreturn]] void report() {
  char address[32];
  std::snprintf(address, sizeof address, "%p", touched);
  // The processor does not tell the address of a misaligned access of 16 bytes.
  std::string message = touched == nullptr
                            ? "a misaligned access, or one to no memory at all"
                            : "an access to memory that is not its own, " + std::string(address);
  if (describe_address != nullptr) message += describe_address(touched);
  abandon(message);
}

// Goes on in report() as if the instruction at fault had called it: there everything is allowed, which is not
// so in a signal handler.
void handle(int signal, siginfo_t* info, void* any_context) {
  if (current == nullptr) {
    ::signal(signal, SIG_DFL);  // not a kernel's: happens again, and ends the process
    return;
  }
  constexpr uintptr_t kRedZone = 128, kAlignment = 16, kReturnAddress = 8;
  touched = info->si_addr;
  auto& registers = static_cast<ucontext_t*>(any_context)->uc_mcontext.gregs;
  const uintptr_t stack = (static_cast<uintptr_t>(registers[REG_RSP]) - kRedZone) & ~(kAlignment - 1);
  registers[REG_RSP] = static_cast<greg_t>(stack - kReturnAddress);
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
}

}  // namespace

Faults::Faults() {
  if (kSanitized) return;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
}

Faults::~Faults() {
  if (kSanitized) return;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
}

#else

Faults::Faults() {}
Faults::~Faults() {}

#endif

}  // namespace fused_res::cuda::sim
