// The binary format of a program: the arguments of the operator conv_program, which library.cpp exposes to
// Python. Free of torch.
#pragma once

#include <cstdint>

namespace fused_res::cpu {

// Places of a value other than the arena; a place of 0 or more is an offset into the arena, in floats per
// image.
enum Place : int64_t { kInput = -1, kOutput = -2, kNowhere = -3 };
enum Kind : int64_t { kConvolution, kMaxPool };

// The fields of a step in order: N is a single number, P a pair (height, width). `from`, `to` and `residual`
// are places, `weight` is an index into the lists of packed weights and biases, all others are the fields of
// ConvolutionArgs and PoolArgs. Python builds a step by these names (_C.PROGRAM_FIELDS).
// clang-format off
#define FUSED_RES_STEP_FIELDS(N, P)                           \
  N(kind) N(from) N(to) N(residual) N(weight) N(tile) N(relu) \
  N(channels) N(height) N(width) N(outputs)                   \
  P(taps) P(stride) P(padding) P(dilation)
// clang-format on

#define FUSED_RES_NUMBER(name) int64_t name;
#define FUSED_RES_PAIR(name) int64_t name[2];
struct Step {
  FUSED_RES_STEP_FIELDS(FUSED_RES_NUMBER, FUSED_RES_PAIR)
};
#undef FUSED_RES_NUMBER
#undef FUSED_RES_PAIR

#define FUSED_RES_NAME(name) #name,
constexpr const char* kStepFields[] = {FUSED_RES_STEP_FIELDS(FUSED_RES_NAME, FUSED_RES_NAME)};
#undef FUSED_RES_NAME
#undef FUSED_RES_STEP_FIELDS

constexpr int64_t kStepNumbers = sizeof(Step) / sizeof(int64_t);

}  // namespace fused_res::cpu
