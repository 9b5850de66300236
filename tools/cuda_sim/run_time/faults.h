// An access to memory that may not be touched, by a kernel, becomes an error of its launch.
#pragma once

#include <signal.h>

#include <string>

namespace fused_res::cuda::sim {

// Ends the current thread, and with it the launch.
[[noreturn]] void abandon(const std::string& message);

// What is known of an address, as text to follow it, or nothing.
extern std::string (*describe_address)(const void* address);

// For as long as it lives.
class Faults {
 public:
  Faults();
  ~Faults();
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

 private:
  struct sigaction before_[2];
};

}  // namespace fused_res::cuda::sim
