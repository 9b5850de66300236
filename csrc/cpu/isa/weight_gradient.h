// The gradient of a convolution's weight: products over output pixels, or over Winograd's tiles (the
// transpose of its convolution: the same points, and the same transform of the input).
#pragma once

#include "cpu/isa/direct.h"
#include "cpu/isa/winograd.h"

namespace fused_res::cpu {
namespace {

// A panel's products for one matrix of factors, `rows` deep.
inline void multiply_panel(Range channels, const float* v, int64_t v_stride, const float* dz,
                           int64_t dz_stride, int64_t rows, bool first, float* sums) {
  for (int half = 0; half < kPanelOutputs; half += kColumns) {
    for_each_row_block(channels.end - channels.begin, [&](int64_t row, int64_t n) {
      const int64_t c = channels.begin + row;
      multiply_rows_down(n, v + c, v_stride, dz + half, dz_stride, rows, first,
                         sums + c * kPanelOutputs + half);
    });
  }
}

constexpr int kTogether = 16;  // channels: a line of memory

// What finish() makes for some channels, by taps: values[tap][kTogether][kPanelOutputs].
inline void store_weight(const WeightGradientArgs& args, int64_t panel, int64_t c, int64_t channels,
                         int64_t first_tap, int64_t taps, const float* values) {
  const auto& shape = args.convolution;
  const int64_t begin = panel * kPanelOutputs, outputs = smaller(kPanelOutputs, shape.outputs - begin);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = (first_tap + tap) / shape.taps_w, x = (first_tap + tap) % shape.taps_w;
      float* to = args.dweight + (begin + o) * args.output_stride + c * args.channel_stride +
                  y * args.row_stride + x * args.column_stride;
      const float* from = values + tap * kTogether * kPanelOutputs + o;
      for (int64_t i = 0; i < channels; ++i) to[i * args.channel_stride] = from[i * kPanelOutputs];
    }
  }
}

// The sums of all parts, in their order.
inline Vec<float> sum_parts(const float* sums, int64_t parts, int64_t stride) {
  Vec<float> sum = load(sums);
  for (int64_t i = 1; i < parts; ++i) sum = sum + load(sums + i * stride);
  return sum;
}

// --- direct ---

inline int64_t window_of(const ConvolutionArgs& args) { return args.taps_h * args.taps_w * args.channels; }

void direct_gradient_input(const WeightGradientArgs& args, Range block, Range part, float* v) {
  const auto& shape = args.convolution;
  if (!shape.gather) return;
  gather(shape, part, v + (part.begin - block.begin) * row_stride(window_of(shape)));
}

void direct_gradient_output(const WeightGradientArgs& args, Range block, Range part, float* dz) {
  if (!args.pack_dz) return;
  const int64_t outputs = args.convolution.outputs, panel = (block.end - block.begin) * kPanelOutputs;
  for (int64_t row = part.begin; row < part.end; ++row) {
    float* to = dz + (row - block.begin) * kPanelOutputs;
    for (int64_t o = 0; o < outputs; o += kPanelOutputs, to += panel) {
      const int64_t n = smaller(kPanelOutputs, outputs - o);
      copy_floats(to, args.dz + row * outputs + o, n);
      clear_floats(to + n, kPanelOutputs - n);
    }
  }
}

void direct_gradient_multiply(const WeightGradientArgs& args, Range block, Range panels, Range channels,
                              const float* v, const float* dz, bool first, float* sums) {
  const auto& shape = args.convolution;
  const int64_t window = window_of(shape), rows = block.end - block.begin;
  const float* from = shape.gather ? v : shape.x + block.begin * shape.channels;
  const int64_t stride = shape.gather ? row_stride(window) : shape.channels;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* columns = args.pack_dz ? dz + panel * rows * kPanelOutputs
                                        : args.dz + block.begin * shape.outputs + panel * kPanelOutputs;
    multiply_panel(channels, from, stride, columns, args.pack_dz ? kPanelOutputs : shape.outputs, rows, first,
                   sums + panel * window * kPanelOutputs);
  }
}

void direct_gradient_finish(const WeightGradientArgs& args, Range panels, Range channels, const float* sums,
                            int64_t parts, int64_t stride) {
  const auto& shape = args.convolution;
  const int64_t window = window_of(shape);
  float values[kTogether * kPanelOutputs];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t tap = 0; tap < shape.taps_h * shape.taps_w; ++tap) {
      for (int64_t c = channels.begin; c < channels.end; c += kTogether) {
        const int64_t n = smaller(kTogether, channels.end - c);
        const float* from = sums + (panel * window + tap * shape.channels + c) * kPanelOutputs;
        for (int64_t i = 0; i < n * kPanelOutputs; i += Vec<float>::lanes) {
          store(values + i, sum_parts(from + i, parts, stride));
        }
        store_weight(args, panel, c, n, tap, 1, values);
      }
    }
  }
}

inline constexpr WeightGradientKernels direct_gradient = {direct_gradient_input, direct_gradient_output,
                                                          direct_gradient_multiply, direct_gradient_finish};

// --- Winograd ---

void winograd_gradient_input(const WeightGradientArgs& args, Range block, Range part, float* v) {
  winograd_input(args.convolution, block, part, v);
}

template <int S, int MY, int MX, class Part>
inline void gradient_vector(Part part, const float* dz, int64_t row, int64_t column, int64_t rows,
                            int64_t columns, float* const* to, int64_t at) {
  using V = Vec<float>;
  constexpr int NY = factors_of(S, MY), NX = factors_of(S, MX);
  V t[NY][MX];
#pragma GCC unroll 4
  for (int j = 0; j < MX; ++j) {
    V d[MY], u[NY];
#pragma GCC unroll 4
    for (int i = 0; i < MY; ++i) {
      d[i] = i < rows && j < columns ? part.load(dz + i * row + j * column) : V::zero();
    }
    transform_gradient<S, MY>(d, u);
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) t[i][j] = u[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < NY; ++i) {
    V u[NX];
    transform_gradient<S, MX>(t[i], u);
#pragma GCC unroll 9
    for (int j = 0; j < NX; ++j) store(to[i * NX + j] + at, u[j]);
  }
}

void winograd_gradient_output(const WeightGradientArgs& args, Range block, Range range, float* dz) {
  const auto& shape = args.convolution;
  const Tiles tiles(shape);
  const Matrices matrices(tiles, block);
  const int64_t panel = matrices.total_rows() * kPanelOutputs;
  const Places<float> places(tiles, matrices, dz, kPanelOutputs);
  for_each_tile(tiles, range, [&](int64_t image, int64_t ty, int64_t tx, int kind, int64_t index) {
    with_tile(tiles, kind, [&](auto by, auto my, auto mx) {
      const int64_t y = ty * shape.tile, x = tx * shape.tile;
      const float* corner = args.dz + ((image * shape.out_height + y) * shape.out_width + x) * shape.outputs;
      for_each_vector<Vec<float>>(shape.outputs, [&](auto part, int64_t o) {
        const int64_t at = o / kPanelOutputs * panel + index * kPanelOutputs + o % kPanelOutputs;
        gradient_vector<by.value, my.value, mx.value>(part, corner + o, shape.out_width * shape.outputs,
                                                      shape.outputs, shape.out_height - y,
                                                      shape.out_width - x, places.of(kind), at);
      });
    });
  });
}

void winograd_gradient_multiply(const WeightGradientArgs& args, Range block, Range panels, Range channels,
                                const float* v, const float* dz, bool first, float* sums) {
  const auto& shape = args.convolution;
  const Matrices matrices(Tiles(shape), block);
  const int64_t stride = row_stride(shape.channels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* columns = dz + panel * matrices.total_rows() * kPanelOutputs;
    float* to = sums + panel * kTransformPoints * shape.channels * kPanelOutputs;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j, to += shape.channels * kPanelOutputs) {
        const int64_t begin = matrices.begin(i, j);
        multiply_panel(channels, v + begin * stride, stride, columns + begin * kPanelOutputs, kPanelOutputs,
                       matrices.rows(i, j), first, to);
      }
    }
  }
}

template <int S>
void winograd_gradient_finish_by(const WeightGradientArgs& args, Range panels, Range channels,
                                 const float* sums, int64_t parts, int64_t stride) {
  using V = Vec<float>;
  const auto& shape = args.convolution;
  const int64_t point = shape.channels * kPanelOutputs;
  float values[kTaps * kTaps][kTogether][kPanelOutputs];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t c = channels.begin; c < channels.end; c += kTogether) {
      const int64_t n = smaller(kTogether, channels.end - c);
      for (int64_t at = 0; at < n * kPanelOutputs; at += V::lanes) {
        const float* from = sums + panel * kTransformPoints * point + c * kPanelOutputs + at;
        V t[kPoints][kTaps];
#pragma GCC unroll 9
        for (int i = 0; i < kPoints; ++i) {
          V u[kPoints];
#pragma GCC unroll 9
          for (int j = 0; j < kPoints; ++j) u[j] = sum_parts(from + (i * kPoints + j) * point, parts, stride);
          transform_weight_gradient<S>(u, t[i]);
        }
#pragma GCC unroll 3
        for (int x = 0; x < kTaps; ++x) {
          V u[kPoints], g[kTaps];
#pragma GCC unroll 9
          for (int i = 0; i < kPoints; ++i) u[i] = t[i][x];
          transform_weight_gradient<S>(u, g);
#pragma GCC unroll 3
          for (int y = 0; y < kTaps; ++y) store(values[y * kTaps + x][0] + at, g[y]);
        }
      }
      store_weight(args, panel, c, n, 0, kTaps * kTaps, values[0][0]);
    }
  }
}

void winograd_gradient_finish(const WeightGradientArgs& args, Range panels, Range channels, const float* sums,
                              int64_t parts, int64_t stride) {
  const auto finish =
      args.convolution.stride_h == 1 ? winograd_gradient_finish_by<1> : winograd_gradient_finish_by<2>;
  finish(args, panels, channels, sums, parts, stride);
}

inline constexpr WeightGradientKernels winograd_gradient = {
    winograd_gradient_input, winograd_gradient_output, winograd_gradient_multiply, winograd_gradient_finish};

}  // namespace
}  // namespace fused_res::cpu
