// Emulator of the AMX instructions that the bf16 kernels use, for tests on x86-64 machines without AMX (AVX2
// and FMA are required). There, an AMX instruction raises SIGILL: a signal handler decodes it, executes it on
// the calling thread's emulated tiles, and resumes after it. The tests thus run the kernels' real machine
// code.
//
// Two ways to use it: link amx_emulator.cpp into a test program and call install(), or load
// amx_emulator_preload.cpp into any process with LD_PRELOAD. Built with a sanitizer, it also checks the
// memory accesses of tile loads and stores.
#pragma once

#include <csignal>
#include <cstdint>

enum AmxInstruction : int {
  kLdtilecfg,
  kSttilecfg,
  kTilerelease,
  kTilezero,
  kTileloadd,
  kTileloaddt1,
  kTilestored,
  kTdpbf16ps,
  kAmxInstructions,
};

using SetSignalAction = int(int signal, const struct sigaction* action, struct sigaction* previous);

extern "C" {
#pragma GCC visibility push(default)

// Installs the handler. A SIGILL of any other instruction goes to the action installed before, after a
// message. An instruction that would raise #UD or #GP prints the reason and raises SIGILL or SIGSEGV, as
// Linux would.
void amx_emulator_install(SetSignalAction* set_action = sigaction);

// Replaces the action that other SIGILLs go to, with the semantics of sigaction(SIGILL, action, previous).
void amx_emulator_replace_other_action(const struct sigaction* action, struct sigaction* previous);

// Returns the number of instructions of one kind that all threads executed since the last reset.
int64_t amx_emulator_executed(AmxInstruction instruction);
void amx_emulator_reset();

// Returns the number of threads whose tiles are configured, including threads that ended without tilerelease:
// zero when no parallel region runs.
int64_t amx_emulator_threads_with_tiles();

#pragma GCC visibility pop
}
