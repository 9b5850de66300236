// Runs the cases whose name contains the first argument, or all of them, with the thread schedule that the
// environment variable FUSED_RES_SIM_SCHEDULE selects.
#include <cstring>
#include <exception>

#include "cases.h"

extern "C" int fused_res_sim_multiprocessors(int count);

int main(int count, char** arguments) {
  using namespace fused_res::cuda::sanitize;
  // ThreadSanitizer supports fewer threads than the resident blocks of a full GPU have.
  fused_res_sim_multiprocessors(1);
  Cases cases;
  add_norms(cases);
  add_max_pools(cases);
  add_convolutions(cases);
  add_conv1x1_backward(cases);
  int run = 0;
  for (const Case& one : cases) {
    if (count > 1 && one.name.find(arguments[1]) == std::string::npos) continue;
    try {
      one.run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", one.name.c_str(), error.what());
      return 2;
    }
    ++run;
  }
  std::printf("%d cases\n", run);
  return run == 0;
}
