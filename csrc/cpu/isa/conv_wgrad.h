// Gradient of a convolution's weight (wgrad), NHWC. The direct algorithm is a GEMM whose K is the output
// pixels; 3x3 kernels also have a Winograd algorithm, whose K is the tiles. Both are computed chunk by chunk
// of K.
//
//   direct:    dw = im2col(x)^T dz
//   Winograd:  dg = G^T [ (B^T d B) * (A dz A^T) ] G, summed over the tiles
//
// The latter is the transpose of the Winograd convolution, with the same points and the same input transform.
// V is the packed input (im2col rows in blocks of elements, see wgrad_row_block, or B^T d B), dZ the packed
// output gradient (rows of dz or A dz A^T).
#pragma once

#include "cpu/isa/direct.h"
#include "cpu/isa/split_k.h"
#include "cpu/isa/winograd.h"

namespace fused_res::cpu {
namespace {

// acc[channel][kPanelWidth] (+)= V^T dZ for one panel of output channels, with K = `rows`.
template <class Step>
inline void gemm_panel(int64_t channels, const float* v, int64_t v_stride, const float* dz, int64_t dz_stride,
                       int64_t rows, bool overwrite, float* acc, const Step& step) {
  for (int column = 0; column < kPanelWidth; column += kNr) {
    for_each_row_block(channels, [&](int64_t c, int64_t n) {
      micro_gemm_tn(n, v + c, v_stride, dz + column, dz_stride, rows, overwrite,
                    acc + c * kPanelWidth + column, step);
    });
  }
}

constexpr int kChannelBlock = 16;  // channels of a cache line

// Scatters values[tap][kChannelBlock][kPanelWidth] of a few input channels into dweight, whose strides are
// arbitrary.
inline void store_dweight(const WeightGradientArgs& args, int64_t panel, int64_t c, int64_t channels,
                          int64_t first_tap, int64_t taps, const float* values) {
  const auto& shape = args.convolution;
  const int64_t begin = panel * kPanelWidth, width = min(kPanelWidth, shape.out_channels - begin);
  for (int64_t o = 0; o < width; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = (first_tap + tap) / shape.kernel_w, x = (first_tap + tap) % shape.kernel_w;
      float* to = args.dweight + (begin + o) * args.output_stride + c * args.channel_stride +
                  y * args.row_stride + x * args.column_stride;
      const float* from = values + tap * kChannelBlock * kPanelWidth + o;
      for (int64_t i = 0; i < channels; ++i) to[i * args.channel_stride] = from[i * kPanelWidth];
    }
  }
}

// --- direct ---

void direct_wgrad_pack_input(const WeightGradientArgs& args, Range block, Range part, float* copied,
                             float* v) {
  const auto& shape = args.convolution;
  const int64_t k = gemm_k(shape), blocks = wgrad_row_blocks(k),
                block_floats = wgrad_row_block_floats(block.end - block.begin);
  const auto pack_row = [&](const float* from, float* to) {
    for (int64_t i = 0; i < blocks; ++i, to += block_floats) {
      const int64_t begin = wgrad_row_block(k, i).begin;
      copy_floats(to, from + begin, min(kWgradLine, k - begin));
    }
  };
  for (int64_t row = part.begin; row < part.end;) {
    const int64_t rows = min(kCopiedRows, part.end - row);
    const float* from = static_cast<const float*>(shape.x) + row * k;
    int64_t stride = k;
    if (shape.needs_im2col) {
      im2col<float>(shape, {row, row + rows}, copied);
      from = copied, stride = padded_row_stride(k);
    }
    for (int64_t i = 0; i < rows; ++i) pack_row(from + i * stride, v + (row + i - block.begin) * kWgradLine);
    row += rows;
  }
}

void direct_wgrad_pack_dz(const WeightGradientArgs& args, Range block, Range part, float* dz) {
  if (!args.pack_dz) return;
  const int64_t out_channels = args.convolution.out_channels,
                panel_floats = (block.end - block.begin) * kPanelWidth;
  for (int64_t row = part.begin; row < part.end; ++row) {
    float* to = dz + (row - block.begin) * kPanelWidth;
    for (int64_t o = 0; o < out_channels; o += kPanelWidth, to += panel_floats) {
      const int64_t n = min(kPanelWidth, out_channels - o);
      copy_floats(to, static_cast<const float*>(args.dz) + row * out_channels + o, n);
      clear_floats(to + n, kPanelWidth - n);
    }
  }
}

void direct_wgrad_gemm(const WeightGradientArgs& args, Range block, Range panels, Range blocks,
                       const float* v, const float* dz, bool overwrite, float* acc, const MemoryRange* next) {
  const auto& shape = args.convolution;
  const int64_t k = gemm_k(shape), rows = block.end - block.begin;
  ChunkPrefetch prefetch(next, (panels.end - panels.begin) * (kPanelWidth / kNr) *
                                   (blocks.end - blocks.begin) * (rows / kTnSteps + 1));
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* columns = args.pack_dz ? dz + panel * rows * kPanelWidth
                                        : static_cast<const float*>(args.dz) +
                                              block.begin * shape.out_channels + panel * kPanelWidth;
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const Range elements = wgrad_row_block(k, i);
      gemm_panel(elements.end - elements.begin, v + i * wgrad_row_block_floats(rows), kWgradLine, columns,
                 args.pack_dz ? kPanelWidth : shape.out_channels, rows, overwrite,
                 acc + (panel * k + elements.begin) * kPanelWidth, [&] { prefetch.advance(); });
    }
  }
}

void direct_wgrad_reduce(const WeightGradientArgs& args, Range panels, Range channels, const float* acc,
                         int64_t parts, int64_t stride) {
  const auto& shape = args.convolution;
  const int64_t k = gemm_k(shape);
  float values[kChannelBlock * kPanelWidth];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t tap = 0; tap < shape.kernel_h * shape.kernel_w; ++tap) {
      for (int64_t c = channels.begin; c < channels.end; c += kChannelBlock) {
        const int64_t n = min(kChannelBlock, channels.end - c);
        const float* from = acc + (panel * k + tap * shape.channels + c) * kPanelWidth;
        for (int64_t i = 0; i < n * kPanelWidth; i += Vec<float>::lanes) {
          store(values + i, reduce_split_k(from + i, parts, stride));
        }
        store_dweight(args, panel, c, n, tap, 1, values);
      }
    }
  }
}

inline constexpr WeightGradientKernels direct_wgrad = {direct_wgrad_pack_input, direct_wgrad_pack_dz,
                                                       direct_wgrad_gemm, direct_wgrad_reduce};

// --- Winograd ---

void winograd_wgrad_input_transform(const WeightGradientArgs& args, Range block, Range part, float*,
                                    float* v) {
  winograd_input_transform<float>(args.convolution, block, part, v);
}

// A dz A^T of one tile for one vector of output channels. Gradients of outputs outside of the image are zero.
template <int S, int MY, int MX, class Part>
inline void grad_output_transform_tile(Part part, const float* dz, int64_t row_stride, int64_t column_stride,
                                       int64_t valid_rows, int64_t valid_columns, float* const* to,
                                       int64_t at) {
  using V = Vec<float>;
  constexpr int NY = alpha(S, MY), NX = alpha(S, MX);
  V t[NY][MX];
#pragma GCC unroll 4
  for (int j = 0; j < MX; ++j) {
    V d[MY], u[NY];
#pragma GCC unroll 4
    for (int i = 0; i < MY; ++i) {
      d[i] = i < valid_rows && j < valid_columns ? part.load(dz + i * row_stride + j * column_stride)
                                                 : V::zero();
    }
    transform_grad_output<S, MY>(d, u);
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) t[i][j] = u[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < NY; ++i) {
    V u[NX];
    transform_grad_output<S, MX>(t[i], u);
#pragma GCC unroll 9
    for (int j = 0; j < NX; ++j) store(to[i * NX + j] + at, u[j]);
  }
}

void winograd_wgrad_dz_transform(const WeightGradientArgs& args, Range block, Range range, float* dz) {
  const auto& shape = args.convolution;
  const TileGrid tiles(shape);
  const TransformLayout layout(tiles, block);
  const int64_t panel_floats = layout.total_rows() * kPanelWidth;
  const TransformPointers<float> pointers(tiles, layout, dz, kPanelWidth);
  for_each_tile(tiles, range, [&](int64_t image, int64_t ty, int64_t tx, int tile_class, int64_t index) {
    dispatch_tile_class(tiles, tile_class, [&](auto s, auto my, auto mx) {
      const int64_t y = ty * shape.tile, x = tx * shape.tile;
      const float* corner = static_cast<const float*>(args.dz) +
                            ((image * shape.out_height + y) * shape.out_width + x) * shape.out_channels;
      for_each_vector<Vec<float>>(shape.out_channels, [&](auto part, int64_t o) {
        const int64_t at = o / kPanelWidth * panel_floats + index * kPanelWidth + o % kPanelWidth;
        grad_output_transform_tile<s.value, my.value, mx.value>(
            part, corner + o, shape.out_width * shape.out_channels, shape.out_channels, shape.out_height - y,
            shape.out_width - x, pointers.of(tile_class), at);
      });
    });
  });
}

void winograd_wgrad_gemm(const WeightGradientArgs& args, Range block, Range panels, Range points,
                         const float* v, const float* dz, bool overwrite, float* acc, const MemoryRange*) {
  const auto& shape = args.convolution;
  const TransformLayout layout(TileGrid(shape), block);
  const int64_t stride = padded_row_stride(shape.channels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* columns = dz + panel * layout.total_rows() * kPanelWidth;
    for (int64_t point = points.begin; point < points.end; ++point) {
      const int i = static_cast<int>(point) / kPoints, j = static_cast<int>(point) % kPoints;
      const int64_t begin = layout.begin(i, j);
      gemm_panel(shape.channels, v + begin * stride, stride, columns + begin * kPanelWidth, kPanelWidth,
                 layout.rows(i, j), overwrite,
                 acc + (panel * kTransformPoints + point) * shape.channels * kPanelWidth, [] {});
    }
  }
}

// Split-K reduction of the transform-domain gradients dU, then G^T dU G. S: stride.
template <int S>
void winograd_wgrad_reduce_stride(const WeightGradientArgs& args, Range panels, Range channels,
                                  const float* acc, int64_t parts, int64_t stride) {
  using V = Vec<float>;
  const auto& shape = args.convolution;
  const int64_t point_floats = shape.channels * kPanelWidth;
  float values[kTaps * kTaps][kChannelBlock][kPanelWidth];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t c = channels.begin; c < channels.end; c += kChannelBlock) {
      const int64_t n = min(kChannelBlock, channels.end - c);
      for (int64_t at = 0; at < n * kPanelWidth; at += V::lanes) {
        const float* from = acc + panel * kTransformPoints * point_floats + c * kPanelWidth + at;
        V t[kPoints][kTaps];
#pragma GCC unroll 9
        for (int i = 0; i < kPoints; ++i) {
          V u[kPoints];
#pragma GCC unroll 9
          for (int j = 0; j < kPoints; ++j)
            u[j] = reduce_split_k(from + (i * kPoints + j) * point_floats, parts, stride);
          transform_grad_filter<S>(u, t[i]);
        }
#pragma GCC unroll 3
        for (int x = 0; x < kTaps; ++x) {
          V u[kPoints], g[kTaps];
#pragma GCC unroll 9
          for (int i = 0; i < kPoints; ++i) u[i] = t[i][x];
          transform_grad_filter<S>(u, g);
#pragma GCC unroll 3
          for (int y = 0; y < kTaps; ++y) store(values[y * kTaps + x][0] + at, g[y]);
        }
      }
      store_dweight(args, panel, c, n, 0, kTaps * kTaps, values[0][0]);
    }
  }
}

void winograd_wgrad_reduce(const WeightGradientArgs& args, Range panels, Range channels, const float* acc,
                           int64_t parts, int64_t stride) {
  const auto reduce =
      args.convolution.stride_h == 1 ? winograd_wgrad_reduce_stride<1> : winograd_wgrad_reduce_stride<2>;
  reduce(args, panels, channels, acc, parts, stride);
}

inline constexpr WeightGradientKernels winograd_wgrad = {
    winograd_wgrad_input_transform, winograd_wgrad_dz_transform, winograd_wgrad_gemm, winograd_wgrad_reduce};

}  // namespace
}  // namespace fused_res::cpu
