// Winograd convolution of 3x3 kernels, with stride 1 (Lavin & Gray 2015, https://arxiv.org/abs/1509.09308) or
// stride 2 (split into filters of 2 taps and 1 tap, see winograd_points.h): input transform V = B^T d B, one
// GEMM M = V U per transform point, output transform Y = A^T M A with the epilogue. The filter transform
// U = G g G^T is done once, by winograd_pack. The one-dimensional transforms are in winograd_points.h, the
// row layout of V and M in tiles.h.
#pragma once

#include "cpu/isa/epilogue.h"
#include "cpu/isa/micro_kernel.h"
#include "cpu/isa/tiles.h"
#include "cpu/isa/winograd_points.h"

namespace fused_res::cpu {
namespace {

// Calls f(Int<size>{}) for a run-time output tile size of 2 to 4.
template <class F>
inline void dispatch_tile_size(int64_t size, F f) {
  if (size == 4) {
    f(Int<4>{});
  } else if (size == 3) {
    f(Int<3>{});
  } else {
    f(Int<2>{});
  }
}
// Calls f(Int<stride>{}, Int<height>{}, Int<width>{}) for the tiles of a class: interior, right edge, bottom
// edge or corner, where the edge classes may have fewer outputs (TileGrid).
template <class F>
inline void dispatch_tile_class(const TileGrid& tiles, int tile_class, F f) {
  dispatch_tile_size(tiles.height(tile_class), [&](auto my) {
    dispatch_tile_size(tiles.width(tile_class), [&](auto mx) {
      if (tiles.stride == 1) {
        f(Int<1>{}, my, mx);
      } else {
        f(Int<2>{}, my, mx);
      }
    });
  });
}

// An input tile of rows x columns pixels: its strides in memory, and the part of it within the image.
struct Window {
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  Range valid_rows, valid_columns;

  bool inside() const {
    return valid_rows.begin <= 0 && valid_rows.end >= rows && valid_columns.begin <= 0 &&
           valid_columns.end >= columns;
  }
};

// Input transform B^T d B of one tile for one vector of channels. `to`: a pointer for each transform-domain
// element.
template <int S, int MY, int MX, class T>
[[gnu::noinline]] void input_transform_tile(const T* x, int64_t row_stride, int64_t column_stride,
                                            float* const* to, int64_t at) {
  using V = Vec<float>;
  constexpr int NY = alpha(S, MY), NX = alpha(S, MX);
  V t[NY][NX];
#pragma GCC unroll 9
  for (int j = 0; j < NX; ++j) {
    V d[NY], u[NY];
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) d[i] = load(x + i * row_stride + j * column_stride);
    transform_input<S, MY>(d, u);
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) t[i][j] = u[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < NY; ++i) {
    V u[NX];
    transform_input<S, MX>(t[i], u);
#pragma GCC unroll 9
    for (int j = 0; j < NX; ++j) store(to[i * NX + j] + at, u[j]);
  }
}

// Copies a tile for one vector of channels, widened, with zeros for padding and for the channels that a
// TailVector lacks. With it one instance of input_transform_tile, that of full float vectors, serves the
// edges and tails of all dtypes: instances of their own were half of an instruction set's code.
template <class Part, class T>
[[gnu::noinline]] void copy_tile(Part part, const T* x, const Window& window, float* to) {
  using V = Vec<float>;
  for (int64_t i = 0; i < window.rows; ++i, x += window.row_stride) {
    const bool valid_row = i >= window.valid_rows.begin && i < window.valid_rows.end;
    const T* p = x;
    for (int64_t j = 0; j < window.columns; ++j, p += window.column_stride, to += V::lanes) {
      const bool valid = valid_row && j >= window.valid_columns.begin && j < window.valid_columns.end;
      store(to, valid ? part.load(p) : V::zero());
    }
  }
}

// Input transform of one tile, all channels.
template <int S, int MY, int MX, class T>
inline void input_transform(int64_t channels, const T* x, const Window& window, float* const* to,
                            int64_t at) {
  using V = Vec<float>;
  constexpr int NY = alpha(S, MY), NX = alpha(S, MX);
  const int64_t whole = window.inside() ? channels / V::lanes * V::lanes : 0;
  for (int64_t c = 0; c < whole; c += V::lanes) {
    // Prefetch the columns that the next tile reads and this one does not.
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) {
#pragma GCC unroll 8
      for (int j = NX; j < NX + S * MX; ++j)
        prefetch(x + c + i * window.row_stride + j * window.column_stride);
    }
    input_transform_tile<S, MY, MX>(x + c, window.row_stride, window.column_stride, to, at + c);
  }
  float copy[NY * NX * V::lanes];
  for_each_vector<V>(channels - whole, [&](auto part, int64_t c) {
    copy_tile(part, x + whole + c, window, copy);
    // Stores full vectors: the rows of V are padded to them.
    input_transform_tile<S, MY, MX>(copy, NX * V::lanes, V::lanes, to, at + whole + c);
  });
}

// Calls f(image, y, x, tile_class, index) for every tile of the range. `index`: position within the tile
// class, as TileGrid::count_before() counts.
template <class F>
inline void for_each_tile(const TileGrid& tiles, Range range, F f) {
  TileClassCounts count = tiles.count_before(range.begin);
  int64_t image = range.begin / tiles.per_image();
  int64_t y = range.begin % tiles.per_image() / tiles.tiles_w, x = range.begin % tiles.tiles_w;
  for (int64_t t = range.begin; t < range.end; ++t) {
    const int tile_class = tiles.tile_class(y, x);
    f(image, y, x, tile_class, count.n[tile_class]++);
    if (++x == tiles.tiles_w) {
      x = 0;
      if (++y == tiles.tiles_h) y = 0, ++image;
    }
  }
}

// For each tile class, a pointer to every transform-domain element (a row of V or M) of the class's tile 0.
// The element of tile `index` is `index` rows further. With stride 2, a tile has several elements at some
// transform points (tiles.h).
template <class T>
class TransformPointers {
 public:
  TransformPointers(const TileGrid& tiles, const TransformLayout& layout, T* data, int64_t stride) {
    const int s = static_cast<int>(tiles.stride);
    for (int tile_class = 0; tile_class < 4; ++tile_class) {
      const int my = static_cast<int>(tiles.height(tile_class)),
                mx = static_cast<int>(tiles.width(tile_class));
      if (my == 0 || mx == 0) continue;
      T** pointer = pointers_[tile_class];
      for (int i = 0; i < alpha(s, my); ++i) {
        for (int j = 0; j < alpha(s, mx); ++j) {
          const int y = point_index(s, my, i), x = point_index(s, mx, j);
          const int64_t tile_row = row_in_tile(s, my, i) * rows_per_tile(s, mx, x) + row_in_tile(s, mx, j);
          *pointer++ = data + stride * layout.row(y, x, tile_class, tile_row, 0);
        }
      }
    }
  }
  T* const* of(int tile_class) const { return pointers_[tile_class]; }

 private:
  T* pointers_[4][kMaxTransformElements];
};

// Input transform of the tiles `range` of a block, all channels.
template <class T>
void winograd_input_transform(const ConvolutionArgs& args, Range block, Range range, float* v) {
  const TileGrid tiles(args);
  const int64_t stride = padded_row_stride(args.channels);
  const TransformPointers<float> pointers(tiles, TransformLayout(tiles, block), v, stride);
  for_each_tile(tiles, range, [&](int64_t image, int64_t ty, int64_t tx, int tile_class, int64_t index) {
    const int64_t y = ty * args.tile * args.stride_h - args.pad_h;
    const int64_t x = tx * args.tile * args.stride_w - args.pad_w;
    const T* corner =
        static_cast<const T*>(args.x) + ((image * args.height + y) * args.width + x) * args.channels;
    dispatch_tile_class(tiles, tile_class, [&](auto s, auto my, auto mx) {
      const Window window = {alpha(s.value, my.value),   alpha(s.value, mx.value),
                             args.width * args.channels, args.channels,
                             {-y, args.height - y},      {-x, args.width - x}};
      input_transform<s.value, my.value, mx.value>(args.channels, corner, window, pointers.of(tile_class),
                                                   index * stride);
    });
  });
}

// Output transform A^T M A of one tile for one vector of output channels.
template <int S, int MY, int MX>
inline void output_transform_tile(const float* const* from, int64_t at, Vec<float> (&y)[MY][MX]) {
  using V = Vec<float>;
  constexpr int NY = alpha(S, MY), NX = alpha(S, MX);
  V t[NY][MX];
#pragma GCC unroll 9
  for (int i = 0; i < NY; ++i) {
    V d[NX];
#pragma GCC unroll 9
    for (int j = 0; j < NX; ++j) d[j] = load(from[i * NX + j] + at);
    transform_output<S, MX>(d, t[i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < MX; ++j) {
    V d[NY], u[MY];
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) d[i] = t[i][j];
    transform_output<S, MY>(d, u);
#pragma GCC unroll 4
    for (int i = 0; i < MY; ++i) y[i][j] = u[i];
  }
}

// Prefetches the operands of the epilogue of tile t.
template <class T>
inline void prefetch_tile(const ConvolutionArgs& args, const TileGrid& tiles, int64_t t, int64_t c) {
  const int64_t image = t / tiles.per_image(), y = t % tiles.per_image() / tiles.tiles_w * tiles.tile;
  const int64_t x = t % tiles.tiles_w * tiles.tile;
  for (int64_t i = y; i < min(y + tiles.tile, args.out_height); ++i) {
    for (int64_t j = x; j < min(x + tiles.tile, args.out_width); ++j) {
      prefetch_epilogue<T>(args, (image * args.out_height + i) * args.out_width + j, c);
    }
  }
}

// Epilogue and store of one output tile of height x width, of which only `rows` x `columns` outputs may lie
// within the image.
template <class T, class Part>
[[gnu::noinline]] void store_tile(const ConvolutionArgs& args, const Epilogue<T>& epilogue, Part part,
                                  int64_t pixel, int64_t rows, int64_t columns, int64_t height, int64_t width,
                                  Vec<float>* outputs, MomentAccumulator* moments) {
  const bool complete = rows >= height && columns >= width;
  for (int64_t i = 0; i < min(height, rows); ++i, pixel += args.out_width) {
    Vec<float>* row = outputs + i * width;
    for (int64_t j = 0; j < min(width, columns); ++j) row[j] = epilogue.apply(part, row[j], pixel + j);
    if (moments && !complete) moments->add(row, min(width, columns));
  }
  if (moments && complete) moments->add(outputs, height * width);
}

// For each panel of output channels: one GEMM per transform point into M, then output transform and epilogue.
template <class T>
void winograd_gemm_output_transform(const ConvolutionArgs& args, Range block, Range panels, const float* v,
                                    float* m, double* moments) {
  using V = Vec<float>;
  const TileGrid tiles(args);
  const TransformLayout layout(tiles, block);
  const int64_t stride = padded_row_stride(args.channels);
  const TransformPointers<const float> pointers(tiles, layout, m, kPanelWidth);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* u =
        static_cast<const float*>(args.packed) + panel * kTransformPoints * args.channels * kPanelWidth;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        const int64_t first = layout.begin(i, j);
        // Prefetch the epilogue's operands so that their loads overlap the GEMMs: each transform point's GEMM
        // prefetches those of every kTransformPoints-th tile.
        const int64_t first_tile = block.begin + i * kPoints + j;
        for (int64_t t = first_tile; t < block.end; t += kTransformPoints)
          prefetch_tile<T>(args, tiles, t, panel * kPanelWidth);
        for (int column = 0; column < kPanelWidth; column += kNr) {
          for_each_row_block(layout.rows(i, j), [&](int64_t row, int64_t rows) {
            micro_gemm(rows, v + (first + row) * stride, stride, u + column, args.channels,
                       m + (first + row) * kPanelWidth + column);
          });
        }
        u += args.channels * kPanelWidth;
      }
    }
    for (int64_t at = 0; at < kPanelWidth; at += V::lanes) {
      const int64_t c = panel * kPanelWidth + at;
      if (c >= args.out_channels) break;
      dispatch_tail(args.out_channels - c, [&](auto part) {
        const Epilogue<T> epilogue(args, part, c);
        MomentAccumulator accumulator;
        for_each_tile(
            tiles, block, [&](int64_t image, int64_t ty, int64_t tx, int tile_class, int64_t index) {
              const int64_t y = ty * args.tile, x = tx * args.tile;
              dispatch_tile_class(tiles, tile_class, [&](auto s, auto my, auto mx) {
                V outputs[my.value][mx.value];
                output_transform_tile<s.value>(pointers.of(tile_class), index * kPanelWidth + at, outputs);
                store_tile(args, epilogue, part, (image * args.out_height + y) * args.out_width + x,
                           args.out_height - y, args.out_width - x, my.value, mx.value, outputs[0],
                           moments ? &accumulator : nullptr);
              });
            });
        if (moments) accumulator.store(part, moments + c, moments + args.out_channels + c);
      });
    }
  }
  if (args.stream) stream_fence();
}

// Doubles that fill a cache line, from floats and back.
constexpr int kDoubles = 8;
using Doubles [[gnu::vector_size(kDoubles * sizeof(double))]] = double;
using Floats [[gnu::vector_size(kDoubles * sizeof(float))]] = float;

inline Doubles load_doubles(const float* p) {
  Floats floats;
  memcpy(&floats, p, sizeof floats);
  return __builtin_convertvector(floats, Doubles);
}
inline void store_floats(float* p, Doubles a) {
  const Floats floats = __builtin_convertvector(a, Floats);
  memcpy(p, &floats, sizeof floats);
}

// Transposes 8 rows of 8 floats, `stride` elements apart, to rows that are `to_stride` apart.
inline void transpose_floats(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Floats a[8], b[8];
  for (int i = 0; i < 8; ++i) memcpy(&a[i], from + i * stride, sizeof a[i]);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + j + 2] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) memcpy(to + i * to_stride, &b[i], sizeof b[i]);
}

// Filter transform U = G g G^T of the panels, in double.
void winograd_pack(const WeightView& weight, Range panels, void* packed) {
  constexpr int kChannelBlock = 16;  // channels that fill a cache line if they are contiguous in the weight
  const int64_t size = weight.channels * kPanelWidth;
  float g[kChannelBlock][kTaps * kTaps][kPanelWidth] = {};
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* u = static_cast<float*>(packed) + panel * kTransformPoints * size;
    const float* first = weight.data + panel * kPanelWidth * weight.output_stride;
    const int64_t width = min(kPanelWidth, weight.out_channels - panel * kPanelWidth);
    if (width < kPanelWidth) memset(g, 0, sizeof(g));
    for (int64_t begin = 0; begin < weight.channels; begin += kChannelBlock) {
      const int64_t channels = min(kChannelBlock, weight.channels - begin);
      const auto element_address = [&](int64_t c, int64_t o, int64_t tap) {
        const int64_t y = tap / kTaps, x = tap % kTaps;
        return first + o * weight.output_stride + (begin + c) * weight.channel_stride +
               y * weight.row_stride + x * weight.column_stride;
      };
      if (weight.output_stride == 1) {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
            copy_floats(g[c][tap], element_address(c, 0, tap), width);
          }
        }
      } else if (weight.channel_stride == 1 && width == kPanelWidth && channels == kChannelBlock) {
        for (int64_t o = 0; o < kPanelWidth; o += 8) {
          for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
            for (int64_t c = 0; c < kChannelBlock; c += 8)
              transpose_floats(element_address(c, o, tap), weight.output_stride, &g[c][tap][o],
                               &g[1][0][0] - &g[0][0][0]);
          }
        }
      } else {
        for (int64_t o = 0; o < width; ++o) {
          for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
            const float* w = element_address(0, o, tap);
            for (int64_t c = 0; c < channels; ++c) {
              g[c][tap][o] = w[c * weight.channel_stride];
            }
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        float to[kPoints][kPoints][kPanelWidth];
        for (int o = 0; o < kPanelWidth; o += kDoubles) {
          Doubles t[kTaps][kPoints];
          for (int x = 0; x < kTaps; ++x) {
            transform_filter(weight.stride, load_doubles(&g[c][0 * kTaps + x][o]),
                             load_doubles(&g[c][1 * kTaps + x][o]), load_doubles(&g[c][2 * kTaps + x][o]),
                             t[x]);
          }
          for (int i = 0; i < kPoints; ++i) {
            Doubles row[kPoints];
            transform_filter(weight.stride, t[0][i], t[1][i], t[2][i], row);
            for (int j = 0; j < kPoints; ++j) store_floats(&to[i][j][o], row[j]);
          }
        }
        for (int p = 0; p < kTransformPoints; ++p) {
          float* line = u + p * size + (begin + c) * kPanelWidth;
          for (int o = 0; o < kPanelWidth; o += Vec<float>::lanes) {
            store_or_stream(FullVector{}, line + o, load(to[0][0] + p * kPanelWidth + o), weight.stream);
          }
        }
      }
    }
  }
  stream_fence();
}

template <class T>
inline constexpr WinogradKernels winograd = {winograd_pack, winograd_input_transform<T>,
                                             winograd_gemm_output_transform<T>};

}  // namespace
}  // namespace fused_res::cpu
