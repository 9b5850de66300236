// A kernel with a deliberate bug, and the same kernel without: every file in kernels/ is compiled twice, with
// BROKEN 0 and 1, into the namespaces `correct` and `broken` (VERSION). main.cpp runs what they registered.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

// By name and version: launches the kernel and says whether its result is right.
using Bugs = std::map<std::pair<std::string, std::string>, std::function<bool()>>;
inline Bugs& bugs() {
  static Bugs all;
  return all;
}

static constexpr const char* kVersion = TEXT(VERSION);

struct Register {
  Register(const char* name, const char* version, std::function<bool()> run) {
    bugs()[{name, version}] = std::move(run);
  }
};
