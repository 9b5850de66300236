// Entry point of the simulator, included by csrc/cuda/device.cuh and launch.h when g++ compiles them
// (README.md).
#pragma once

#include "cuda_builtins.h"
#include "runtime.h"
