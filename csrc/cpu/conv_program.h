// The encoding of an inference graph as the integer argument `steps` of the operator conv_program.
// library.cpp exposes it to Python. Free of torch.
#pragma once

#include <cstdint>

namespace fused_res::cpu {

// Locations of a value. A location of 0 or more is an offset into the arena, in elements per image; negative
// ones are the graph's input, the graph's output and an absent operand.
enum Location : int64_t { kInput = -1, kOutput = -2, kNoOperand = -3 };
enum StepKind : int64_t { kConvolution, kMaxPool, kGlobalAveragePool };

// The fields of a step in order: N is a single integer, P a pair (height, width). `input`, `output` and
// `residual` are locations, `weight` is an index into the lists of packed weights and biases, the others are
// those of ConvolutionArgs and PoolArgs. A linear layer is a 1x1 convolution of a pooled image. Python
// encodes a step by these names (_C.GRAPH_STEP_FIELDS).
// clang-format off
#define FUSED_RES_STEP_FIELDS(N, P)                                \
  N(kind) N(input) N(output) N(residual) N(weight)                 \
  N(tile) N(bf16_products) N(relu)                                 \
  N(channels) N(height) N(width) N(out_channels)                   \
  P(kernel_size) P(stride) P(padding) P(dilation)
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

// Integers of a step.
constexpr int64_t kStepSize = sizeof(Step) / sizeof(int64_t);

}  // namespace fused_res::cpu
