// Convolution as one product: rows are output pixels, the depth their window of taps and channels, the
// columns outputs. A 1x1 kernel with stride 1 has its rows in memory; others are gathered, block by block.
#pragma once

#include "cpu/isa/epilogue.h"
#include "cpu/isa/product.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {

void direct_pack(const Weight& weight, Range panels, float* packed) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* to = packed + panel * weight.taps_h * weight.taps_w * weight.channels * kPanelOutputs;
    const int64_t outputs = smaller(kPanelOutputs, weight.outputs - panel * kPanelOutputs);
    const float* from = weight.data + panel * kPanelOutputs * weight.output_stride;
    for (int64_t y = 0; y < weight.taps_h; ++y) {
      for (int64_t x = 0; x < weight.taps_w; ++x) {
        for (int64_t c = 0; c < weight.channels; ++c, to += kPanelOutputs) {
          const float* w =
              from + y * weight.row_stride + x * weight.column_stride + c * weight.channel_stride;
          for (int64_t o = 0; o < kPanelOutputs; ++o)
            to[o] = o < outputs ? w[o * weight.output_stride] : 0.0f;
        }
      }
    }
  }
}

inline void clear_floats(float* to, int64_t n) {
  for_each_vector<Vec<float>>(n, [&](auto part, int64_t i) { part.store(to + i, Vec<float>::zero()); });
}

// The taps [begin, end) of one dimension that meet the image when the first lies at `position`.
inline Range taps_inside(int64_t position, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t begin = position < 0 ? smaller((-position + dilation - 1) / dilation, taps) : 0;
  const int64_t end = position < size ? smaller((size - 1 - position) / dilation + 1, taps) : 0;
  return {begin, end < begin ? begin : end};
}

// Rows of windows, row_stride(depth) apart.
inline void gather(const ConvolutionArgs& args, Range rows, float* to) {
  using V = Vec<float>;
  const int64_t run = args.taps_w * args.channels, stride = row_stride(args.taps_h * run);
  int64_t x = rows.begin % args.out_width, y = rows.begin / args.out_width % args.out_height;
  int64_t image = rows.begin / (args.out_width * args.out_height);
  const auto advance = [&] {
    if (++x == args.out_width) {
      x = 0;
      if (++y == args.out_height) y = 0, ++image;
    }
  };
  const float* const end = args.x + args.images * args.height * args.width * args.channels;
  for (int64_t row = rows.begin; row < rows.end; ++row, to += stride) {
    const int64_t top = y * args.stride_h - args.pad_h, left = x * args.stride_w - args.pad_w;
    const Range inside_h = taps_inside(top, args.taps_h, args.dilation_h, args.height);
    const Range inside_w = taps_inside(left, args.taps_w, args.dilation_w, args.width);
    const float* corner = args.x + ((image * args.height + top) * args.width + left) * args.channels;
    const int64_t pitch = args.dilation_h * args.width * args.channels;
    if (inside_h.end - inside_h.begin == args.taps_h && inside_w.end - inside_w.begin == args.taps_w &&
        args.dilation_w == 1 && corner + (args.taps_h - 1) * pitch + run + V::lanes <= end) {
      // Whole vectors: what they bring too much is written over by the next line, or lies in the rows'
      // padding.
      for (int64_t i = 0; i < args.taps_h; ++i) {
        for (int64_t j = 0; j < run; j += V::lanes) store(to + i * run + j, load(corner + i * pitch + j));
      }
      advance();
      continue;
    }
    for (int64_t i = 0; i < args.taps_h; ++i) {
      float* line = to + i * run;
      if (i < inside_h.begin || i >= inside_h.end || inside_w.begin == inside_w.end) {
        clear_floats(line, run);
        continue;
      }
      const float* from = corner + i * pitch;
      clear_floats(line, inside_w.begin * args.channels);
      if (args.dilation_w == 1) {
        copy_floats(line + inside_w.begin * args.channels, from + inside_w.begin * args.channels,
                    (inside_w.end - inside_w.begin) * args.channels);
      } else {
        for (int64_t j = inside_w.begin; j < inside_w.end; ++j) {
          copy_floats(line + j * args.channels, from + j * args.dilation_w * args.channels, args.channels);
        }
      }
      clear_floats(line + inside_w.end * args.channels, run - inside_w.end * args.channels);
    }
    advance();
  }
}

// A block of whole vectors straight from the registers: by way of memory, as in direct_run, a block 64 to 256
// channels deep takes 4 % longer.
template <int R>
inline void convolve_block(const ConvolutionArgs& args, const float* a, int64_t stride, const float* b,
                           int64_t depth, int64_t pixel, int64_t c) {
  using V = Vec<float>;
  V sums[R][kVectors];
  sum_products<R>(a, stride, b, depth, sums);
  const int64_t pitch = args.outputs, first = pixel * pitch + c;
  if (args.bias) {
    V bias[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) bias[v] = load(args.bias + c + v * V::lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = sums[r][v] + bias[v];
    }
  }
  if (args.residual) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = sums[r][v] + load(args.residual + first + r * pitch + v * V::lanes);
    }
  }
  if (args.relu) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = keep(not_less_equal_zero(sums[r][v]), sums[r][v]);
    }
  }
  const bool stream = streams(args);
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      put(Whole{}, args.y + first + r * pitch + v * V::lanes, sums[r][v], stream);
  }
}

void direct_run(const ConvolutionArgs& args, Range rows, Range panels, float* scratch, double* moments) {
  constexpr int kLanes = Vec<float>::lanes;
  const int64_t depth = args.taps_h * args.taps_w * args.channels;
  const float* a = args.x + rows.begin * args.channels;
  int64_t stride = args.channels;
  if (args.gather) {
    gather(args, rows, scratch);
    a = scratch, stride = row_stride(depth);
  }
  const int64_t end = smaller(panels.end * kPanelOutputs, args.outputs);
  for (int64_t c = panels.begin * kPanelOutputs; c < end; c += kColumns) {
    const float* b = args.packed + c / kPanelOutputs * kPanelOutputs * depth + c % kPanelOutputs;
    Moments sums[kVectors];
    for_each_row_block(rows.end - rows.begin, [&](int64_t row, int64_t n) {
      for (int64_t r = 0; r < n; ++r) epilogue_prefetch(args, rows.begin + row + r, c);
      if (c + kColumns <= end && moments == nullptr) {
        return with_rows(n, [&](auto count) {
          convolve_block<count.value>(args, a + row * stride, stride, b, depth, rows.begin + row, c);
        });
      }
      float products[kRows * kPanelOutputs];
      multiply_rows(n, a + row * stride, stride, b, depth, products);
      for (int v = 0; v < kVectors && c + v * kLanes < end; ++v) {
        with_part(end - (c + v * kLanes), [&](auto part) {
          const Epilogue epilogue(args, part, c + v * kLanes);
          Vec<float> values[kRows];
          for (int64_t r = 0; r < n; ++r) {
            values[r] = load(products + r * kPanelOutputs + v * kLanes);
            values[r] = epilogue.finish(part, values[r], rows.begin + row + r);
          }
          if (moments) sums[v].add(values, n);
        });
      }
    });
    for (int v = 0; moments && v < kVectors && c + v * kLanes < end; ++v) {
      const int64_t at = c + v * kLanes;
      with_part(end - at, [&](auto part) { sums[v].store(part, moments + at, moments + args.outputs + at); });
    }
  }
  if (args.stream) stream_fence();
}

inline constexpr DirectKernels direct = {direct_pack, direct_run};

}  // namespace
}  // namespace fused_res::cpu
