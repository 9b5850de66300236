// Registry of kernels with a deliberate bug. Every file in kernels/ is compiled twice, with BROKEN 0 and 1,
// into the namespaces `correct` and `broken` (VERSION), and main.cpp runs one of them.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

// By name and version: a function that launches the kernel and returns whether its result is correct.
using Bugs = std::map<std::pair<std::string, std::string>, std::function<bool()>>;
inline Bugs& bugs() {
  static Bugs all;
  return all;
}

static constexpr const char* kVersion = TEXT(VERSION);

struct BugRegistrar {
  BugRegistrar(const char* name, const char* version, std::function<bool()> run) {
    bugs()[{name, version}] = std::move(run);
  }
};
