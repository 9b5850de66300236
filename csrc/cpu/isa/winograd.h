// Winograd convolution of 3x3 kernels with stride 1 or 2: input tiles to factors, a product for each pair of
// points, products to output tiles.
#pragma once

#include "cpu/isa/epilogue.h"
#include "cpu/isa/product.h"
#include "cpu/isa/tiles.h"
#include "cpu/isa/winograd_points.h"

namespace fused_res::cpu {
namespace {

// f(Int<size>) for the sizes of tiles.
template <class F>
inline void with_size(int64_t size, F f) {
  if (size == 4) {
    f(Int<4>{});
  } else if (size == 3) {
    f(Int<3>{});
  } else {
    f(Int<2>{});
  }
}
// f(Int<stride>, Int<height>, Int<width>) for a kind of tile.
template <class F>
inline void with_tile(const Tiles& tiles, int kind, F f) {
  with_size(tiles.height(kind), [&](auto my) {
    with_size(tiles.width(kind), [&](auto mx) {
      if (tiles.stride == 1) {
        f(Int<1>{}, my, mx);
      } else {
        f(Int<2>{}, my, mx);
      }
    });
  });
}

// The part of a tile's input that is inside of the image.
struct Window {
  int64_t row, column;  // strides
  Range rows, columns;
};

template <int S, int MY, int MX, bool kInside, class Part>
inline void input_vector(Part part, const float* x, const Window& window, float* const* to, int64_t at) {
  using V = Vec<float>;
  constexpr int NY = factors_of(S, MY), NX = factors_of(S, MX);
  if constexpr (kInside) {  // what the next tile reads, and this one does not
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) {
#pragma GCC unroll 8
      for (int j = NX; j < NX + S * MX; ++j) prefetch(x + i * window.row + j * window.column);
    }
  }
  V t[NY][NX];
#pragma GCC unroll 9
  for (int j = 0; j < NX; ++j) {
    V d[NY], u[NY];
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) {
      const float* p = x + i * window.row + j * window.column;
      if constexpr (kInside) {
        d[i] = part.load(p);
      } else {
        const bool inside = i >= window.rows.begin && i < window.rows.end && j >= window.columns.begin &&
                            j < window.columns.end;
        d[i] = inside ? part.load(p) : V::zero();
      }
    }
    transform_input<S, MY>(d, u);
#pragma GCC unroll 9
    for (int i = 0; i < NY; ++i) t[i][j] = u[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < NY; ++i) {
    V u[NX];
    transform_input<S, MX>(t[i], u);
#pragma GCC unroll 9
    for (int j = 0; j < NX; ++j) part.store(to[i * NX + j] + at, u[j]);
  }
}

// f(y, x, image, kind, index) for the tiles, index as Tiles::before counts.
template <class F>
inline void for_each_tile(const Tiles& tiles, Range range, F f) {
  Kinds count = tiles.before(range.begin);
  int64_t image = range.begin / tiles.in_image();
  int64_t y = range.begin % tiles.in_image() / tiles.across, x = range.begin % tiles.across;
  for (int64_t t = range.begin; t < range.end; ++t) {
    const int kind = tiles.kind(y, x);
    f(image, y, x, kind, count.n[kind]++);
    if (++x == tiles.across) {
      x = 0;
      if (++y == tiles.down) y = 0, ++image;
    }
  }
}

// Where a tile of each kind has its factors, or products: a pointer to each, for the tile whose index is 0.
template <class T>
class Places {
 public:
  Places(const Tiles& tiles, const Matrices& matrices, T* data, int64_t stride) {
    const int by = static_cast<int>(tiles.stride);
    for (int kind = 0; kind < 4; ++kind) {
      const int my = static_cast<int>(tiles.height(kind)), mx = static_cast<int>(tiles.width(kind));
      if (my == 0 || mx == 0) continue;
      T** place = places_[kind];
      for (int i = 0; i < factors_of(by, my); ++i) {
        for (int j = 0; j < factors_of(by, mx); ++j) {
          const int y = point_of(by, my, i), x = point_of(by, mx, j);
          const int64_t turn = turn_of(by, my, i) * rows_at(by, mx, x) + turn_of(by, mx, j);
          *place++ = data + stride * matrices.row(y, x, kind, turn, 0);
        }
      }
    }
  }
  T* const* of(int kind) const { return places_[kind]; }

 private:
  T* places_[4][kMostFactors];
};

void winograd_input(const ConvolutionArgs& args, Range block, Range range, float* v) {
  const Tiles tiles(args);
  const int64_t stride = row_stride(args.channels);
  const Places<float> places(tiles, Matrices(tiles, block), v, stride);
  for_each_tile(tiles, range, [&](int64_t image, int64_t ty, int64_t tx, int kind, int64_t index) {
    const int64_t y = ty * args.tile * args.stride_h - args.pad_h;
    const int64_t x = tx * args.tile * args.stride_w - args.pad_w;
    const float* corner = args.x + ((image * args.height + y) * args.width + x) * args.channels;
    const Window window = {
        args.width * args.channels, args.channels, {-y, args.height - y}, {-x, args.width - x}};
    with_tile(tiles, kind, [&](auto by, auto my, auto mx) {
      constexpr int S = by.value, MY = my.value, MX = mx.value;
      const auto run = [&](auto inside) {
        for_each_vector<Vec<float>>(args.channels, [&](auto part, int64_t c) {
          input_vector<S, MY, MX, inside.value>(part, corner + c, window, places.of(kind),
                                                index * stride + c);
        });
      };
      if (y >= 0 && x >= 0 && y + factors_of(S, MY) <= args.height && x + factors_of(S, MX) <= args.width) {
        run(Int<true>{});
      } else {
        run(Int<false>{});
      }
    });
  });
}

template <int S, int MY, int MX>
inline void output_tile(const float* const* from, int64_t at, Vec<float> (&y)[MY][MX]) {
  using V = Vec<float>;
  constexpr int NY = factors_of(S, MY), NX = factors_of(S, MX);
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

inline void prefetch_tile(const ConvolutionArgs& args, const Tiles& tiles, int64_t t, int64_t c) {
  const int64_t image = t / tiles.in_image(), y = t % tiles.in_image() / tiles.across * tiles.tile;
  const int64_t x = t % tiles.across * tiles.tile;
  for (int64_t i = y; i < smaller(y + tiles.tile, args.out_height); ++i) {
    for (int64_t j = x; j < smaller(x + tiles.tile, args.out_width); ++j) {
      epilogue_prefetch(args, (image * args.out_height + i) * args.out_width + j, c);
    }
  }
}

// Adds, clamps, writes; a tile at the border of the image may be cropped.
template <int MY, int MX, class Part>
inline void write_tile(const ConvolutionArgs& args, const Epilogue& epilogue, Part part, int64_t pixel,
                       int64_t rows, int64_t columns, Vec<float> (&outputs)[MY][MX], Moments* moments) {
  if (rows >= MY && columns >= MX) {
#pragma GCC unroll 4
    for (int i = 0; i < MY; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < MX; ++j) {
        outputs[i][j] = epilogue.finish(part, outputs[i][j], pixel + i * args.out_width + j);
      }
    }
    if (moments) moments->add(outputs[0], MY * MX);
    return;
  }
  for (int i = 0; i < MY && i < rows; ++i) {
    for (int j = 0; j < MX && j < columns; ++j) {
      outputs[i][j] = epilogue.finish(part, outputs[i][j], pixel + i * args.out_width + j);
    }
    if (moments) moments->add(outputs[i], smaller(columns, MX));
  }
}

void winograd_output(const ConvolutionArgs& args, Range block, Range panels, const float* v, float* products,
                     double* moments) {
  using V = Vec<float>;
  const Tiles tiles(args);
  const Matrices matrices(tiles, block);
  const int64_t stride = row_stride(args.channels);
  const Places<const float> places(tiles, matrices, products, kPanelOutputs);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* u = args.packed + panel * kTransformPoints * args.channels * kPanelOutputs;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        const int64_t first = matrices.begin(i, j);
        // Spread over the products: the memory that the tiles' outputs will touch.
        const int64_t turn = block.begin + i * kPoints + j;
        for (int64_t t = turn; t < block.end; t += kTransformPoints)
          prefetch_tile(args, tiles, t, panel * kPanelOutputs);
        for (int half = 0; half < kPanelOutputs; half += kColumns) {
          for_each_row_block(matrices.rows(i, j), [&](int64_t row, int64_t rows) {
            multiply_rows(rows, v + (first + row) * stride, stride, u + half, args.channels,
                          products + (first + row) * kPanelOutputs + half);
          });
        }
        u += args.channels * kPanelOutputs;
      }
    }
    for (int64_t at = 0; at < kPanelOutputs; at += V::lanes) {
      const int64_t c = panel * kPanelOutputs + at;
      if (c >= args.outputs) break;
      with_part(args.outputs - c, [&](auto part) {
        const Epilogue epilogue(args, part, c);
        Moments sums;
        for_each_tile(tiles, block, [&](int64_t image, int64_t ty, int64_t tx, int kind, int64_t index) {
          const int64_t y = ty * args.tile, x = tx * args.tile;
          with_tile(tiles, kind, [&](auto by, auto my, auto mx) {
            V outputs[my.value][mx.value];
            output_tile<by.value>(places.of(kind), index * kPanelOutputs + at, outputs);
            write_tile(args, epilogue, part, (image * args.out_height + y) * args.out_width + x,
                       args.out_height - y, args.out_width - x, outputs, moments ? &sums : nullptr);
          });
        });
        if (moments) sums.store(part, moments + c, moments + args.outputs + c);
      });
    }
  }
  if (args.stream) stream_fence();
}

// Floats of a packed weight that no cache keeps until it is read: written past them.
constexpr int64_t kUncached = 4 << 20;

void winograd_pack(const Weight& weight, Range panels, float* packed) {
  constexpr int kTogether = 16;  // channels: a line of memory, whichever way the weight lies in it
  const int64_t size = weight.channels * kPanelOutputs;
  const bool past = kTransformPoints * size * (weight.outputs / kPanelOutputs) > kUncached;
  float g[kTogether][kTaps * kTaps][kPanelOutputs] = {};
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* u = packed + panel * kTransformPoints * size;
    const float* first = weight.data + panel * kPanelOutputs * weight.output_stride;
    const int64_t outputs = smaller(kPanelOutputs, weight.outputs - panel * kPanelOutputs);
    if (outputs < kPanelOutputs) memset(g, 0, sizeof(g));
    for (int64_t begin = 0; begin < weight.channels; begin += kTogether) {
      const int64_t channels = smaller(kTogether, weight.channels - begin);
      const auto read = [&](int64_t c, int64_t o, int64_t tap) {
        const int64_t y = tap / kTaps, x = tap % kTaps;
        return first + o * weight.output_stride + (begin + c) * weight.channel_stride +
               y * weight.row_stride + x * weight.column_stride;
      };
      if (weight.output_stride == 1) {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
            copy_floats(g[c][tap], read(c, 0, tap), outputs);
          }
        }
      } else {
        for (int64_t o = 0; o < outputs; ++o) {
          for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
            const float* w = read(0, o, tap);
            for (int64_t c = 0; c < channels; ++c) {
              g[c][tap][o] = w[c * weight.channel_stride];
            }
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        float to[kPoints][kPoints][kPanelOutputs];
        for (int o = 0; o < kPanelOutputs; ++o) {  // the compiler makes vectors of this
          double t[kTaps][kPoints];
          for (int x = 0; x < kTaps; ++x) {
            transform_kernel(weight.stride, static_cast<double>(g[c][0 * kTaps + x][o]),
                             static_cast<double>(g[c][1 * kTaps + x][o]),
                             static_cast<double>(g[c][2 * kTaps + x][o]), t[x]);
          }
          for (int i = 0; i < kPoints; ++i) {
            double row[kPoints];
            transform_kernel(weight.stride, t[0][i], t[1][i], t[2][i], row);
            for (int j = 0; j < kPoints; ++j) to[i][j][o] = static_cast<float>(row[j]);
          }
        }
        for (int p = 0; p < kTransformPoints; ++p) {
          float* line = u + p * size + (begin + c) * kPanelOutputs;
          for (int o = 0; o < kPanelOutputs; o += Vec<float>::lanes) {
            put(Whole{}, line + o, load(to[0][0] + p * kPanelOutputs + o), past);
          }
        }
      }
    }
  }
  stream_fence();
}

inline constexpr WinogradKernels winograd = {winograd_pack, winograd_input, winograd_output};

}  // namespace
}  // namespace fused_res::cpu
