// The AMX emulator as a shared library for LD_PRELOAD: the whole process runs AMX instructions. Other
// handlers of SIGILL do not replace the emulator's, and Linux's permission for tile data is granted.
#include <dlfcn.h>
#include <sys/syscall.h>

#include <cstdarg>

#include "amx_emulator.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace {

constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// The definition that this library's function of the same name replaces.
template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

[[gnu::constructor]] void install() { amx_emulator_install(next<SetSignalAction>("sigaction")); }

}  // namespace

EXPORT int sigaction(int signal, const struct sigaction* action, struct sigaction* previous) {
  static auto* const next_sigaction = next<SetSignalAction>("sigaction");
  if (signal != SIGILL) return next_sigaction(signal, action, previous);
  amx_emulator_replace_other_action(action, previous);
  return 0;
}

EXPORT sighandler_t signal(int signal, sighandler_t handler) {
  static auto* const next_signal = next<decltype(::signal)>("signal");
  if (signal != SIGILL) return next_signal(signal, handler);
  struct sigaction action = {}, previous;
  action.sa_handler = handler;
  amx_emulator_replace_other_action(&action, &previous);
  return previous.sa_handler;
}

EXPORT long syscall(long number, ...) {
  static auto* const next_syscall = next<decltype(::syscall)>("syscall");
  va_list values;
  va_start(values, number);
  long arguments[6];  // registers: reading more than the caller passed is harmless
  for (long& argument : arguments) argument = va_arg(values, long);
  va_end(values);
  const auto [a, b, c, d, e, f] = arguments;
  if (number == SYS_arch_prctl && a == kRequestPermission && b == kTileData) return 0;
  return next_syscall(number, a, b, c, d, e, f);
}
