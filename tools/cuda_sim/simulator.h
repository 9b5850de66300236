// Included by csrc/cuda/device.cuh and launch.h where g++ compiles them: see README.md.
#pragma once

#include "run_time.h"
#include "words.h"
