// Signal handler for SIGSEGV and SIGBUS of simulated kernels.
#include "fault_handler.h"

#include <ucontext.h>

#include <cstdint>
#include <cstdio>

#include "execution_state.h"
#include "sanitizers.h"

namespace fused_res::cuda::sim {

std::string (*describe_address)(const void*) = nullptr;

#ifdef __x86_64__

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
const void* fault_address;

[[noreturn]] void report() {
  char address[32];
  std::snprintf(address, sizeof address, "%p", fault_address);
  // The processor does not report the address of a misaligned access of 16 bytes.
  std::string message = fault_address == nullptr ? "a misaligned access, or an access to an invalid address"
                                                 : "an out-of-bounds access, " + std::string(address);
  if (describe_address != nullptr) message += describe_address(fault_address);
  abort_launch(message);
}

// Returns from the signal into report(), as if the faulting instruction had called it: unlike a signal
// handler, report() may allocate memory and switch fibers.
void handle(int signal, siginfo_t* info, void* any_context) {
  if (current == nullptr) {
    ::signal(signal, SIG_DFL);  // not in a kernel: the instruction faults again and ends the process
    return;
  }
  constexpr uintptr_t kRedZone = 128, kAlignment = 16, kReturnAddress = 8;
  fault_address = info->si_addr;
  auto& registers = static_cast<ucontext_t*>(any_context)->uc_mcontext.gregs;
  const uintptr_t stack = (static_cast<uintptr_t>(registers[REG_RSP]) - kRedZone) & ~(kAlignment - 1);
  registers[REG_RSP] = static_cast<greg_t>(stack - kReturnAddress);
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
}

}  // namespace

FaultHandler::FaultHandler() {
  if (kSanitized) return;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &previous_[i]);
}

FaultHandler::~FaultHandler() {
  if (kSanitized) return;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &previous_[i], nullptr);
}

#else

FaultHandler::FaultHandler() {}
FaultHandler::~FaultHandler() {}

#endif

}  // namespace fused_res::cuda::sim
