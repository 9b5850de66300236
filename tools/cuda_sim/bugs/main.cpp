// Runs one version of one bug under all schedules. Exit status 0: all results are correct, 1: a wrong result,
// 2: an error of the runtime, 3: no such bug. Sanitizers exit with a status of their own.
#include <algorithm>
#include <cstdio>

#define VERSION none
#include "bug.h"

extern "C" int fused_res_sim_schedule(int);

int main(int count, char** arguments) {
  const auto bug = count == 3 ? bugs().find({arguments[1], arguments[2]}) : bugs().end();
  if (bug == bugs().end()) {
    for (const auto& [name, run] : bugs()) std::printf("%s %s\n", name.first.c_str(), name.second.c_str());
    return 3;
  }
  int status = 0;
  for (int schedule = 0; schedule < 4; ++schedule) {
    fused_res_sim_schedule(schedule);
    try {
      if (!bug->second()) {
        std::printf("schedule %d: wrong\n", schedule);
        status = std::max(status, 1);
      }
    } catch (const std::exception& error) {
      std::printf("schedule %d: %s\n", schedule, error.what());
      status = 2;
    }
  }
  return status;
}
