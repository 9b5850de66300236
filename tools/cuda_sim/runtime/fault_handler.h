// Turns SIGSEGV and SIGBUS in a simulated kernel into an error of its launch.
#pragma once

#include <signal.h>

#include <string>

namespace fused_res::cuda::sim {

// Ends the current thread, and with it the launch.
[[noreturn]] void abort_launch(const std::string& message);

// Optional: returns text about an address to append to the message, for example the tensor that it is next
// to.
extern std::string (*describe_address)(const void* address);

// Installs the signal handler in its constructor and restores the previous one in its destructor.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction previous_[2];
};

}  // namespace fused_res::cuda::sim
