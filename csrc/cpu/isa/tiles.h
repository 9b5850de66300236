// How Winograd cuts images into tiles, and where a tile's factors lie. The last tiles of a row or a column
// may be smaller than the others; then they lack some points of interpolation, and the matrices of these have
// fewer rows.
#pragma once

#include "cpu/isa/kernels.h"

namespace fused_res::cpu {
namespace {

constexpr int kTaps = 3;
constexpr int kPoints = 6;
constexpr int kTransformPoints = kPoints * kPoints;  // in two dimensions: one matrix for each

// Where the factors of F(m) belong, in one dimension: winograd_points.h. The factor `l` is that of a point,
// or with stride 2 and behind the points', of an input under the tap in the middle. Such factors share a
// place.
constexpr int kMiddle = kPoints - 2, kInfinity = kPoints - 1;
constexpr int factors_of(int stride, int m) { return (m - 1) * stride + kTaps; }  // as many as inputs
constexpr int kMostFactors = factors_of(2, 4) * factors_of(2, 4);
constexpr int points_of(int stride, int m) { return stride == 1 ? m + 2 : m + 1; }
constexpr int point_of(int stride, int m, int l) {
  const int points = points_of(stride, m);
  return l < points - 1 ? l : l == points - 1 ? kInfinity : kMiddle;
}
constexpr int turn_of(int stride, int m, int l) {
  return l < points_of(stride, m) ? 0 : l - points_of(stride, m);
}
// How many factors of F(m) have this place.
constexpr int64_t rows_at(int64_t stride, int64_t m, int point) {
  if (stride == 2 && point == kMiddle) return m;
  return point == kInfinity || point < points_of(static_cast<int>(stride), static_cast<int>(m)) - 1;
}

// Numbers for each kind of tile: bit 1 of the index is set for the last row of tiles, bit 0 for the last
// column, if these are smaller.
struct Kinds {
  int64_t n[4];
};

struct Tiles {
  int64_t stride;          // of the convolution
  int64_t tile;            // outputs a side
  int64_t across, down;    // tiles
  int64_t edge_w, edge_h;  // outputs in the last tile, 0 if it is like the others

  Tiles(int64_t by, int64_t size, int64_t out_height, int64_t out_width)
      : stride(by),
        tile(size),
        across((out_width + size - 1) / size),
        down((out_height + size - 1) / size),
        edge_w(edge(out_width)),
        edge_h(edge(out_height)) {}
  explicit Tiles(const ConvolutionArgs& args)
      : Tiles(args.stride_h, args.tile, args.out_height, args.out_width) {}

  int64_t in_image() const { return across * down; }
  int64_t factors() const {  // of a whole tile
    const int side = factors_of(static_cast<int>(stride), static_cast<int>(tile));
    return side * side;
  }
  // Of the outputs in a tile; one that has no kind of its own is cropped.
  int64_t height(int kind) const { return kind & 2 ? edge_h : tile; }
  int64_t width(int kind) const { return kind & 1 ? edge_w : tile; }
  int kind(int64_t y, int64_t x) const {
    return (edge_h != 0 && y == down - 1) * 2 + (edge_w != 0 && x == across - 1);
  }

  // How many of each kind come before this tile.
  Kinds before(int64_t index) const {
    const int64_t image = index / in_image(), y = index % in_image() / across, x = index % across;
    const int64_t rows = down - (edge_h != 0), columns = across - (edge_w != 0);
    const int64_t whole = y < rows ? y : rows;        // rows of this image that are complete
    const int64_t first = x < columns ? x : columns;  // of the incomplete row
    Kinds k = {{image * rows * columns + whole * columns,
                image * rows * (across - columns) + whole * (across - columns),
                image * (down - rows) * columns, image * (down - rows) * (across - columns)}};
    const int row = y < rows ? 0 : 2;
    k.n[row] += first;
    k.n[row + 1] += x - first;
    return k;
  }

 private:
  int64_t edge(int64_t size) const {
    const int64_t rest = size % tile;
    return tile == 2 || rest == 0 ? 0 : rest == 1 ? 2 : rest;  // a tile has at least 2, and is cropped
  }
};

// The matrices of a block of tiles, one for each pair of points, with the rows of all the tiles that have it:
// first those of one kind, then the next. Where a tile has several rows, those of all tiles come in turns.
class Matrices {
 public:
  Matrices(const Tiles& tiles, Range block) : first_(tiles.before(block.begin)) {
    const Kinds end = tiles.before(block.end);
    for (int kind = 0; kind < 4; ++kind) counts_.n[kind] = end.n[kind] - first_.n[kind];
    int64_t row = 0;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        for (int kind = 0; kind < 4; ++kind) {
          begin_[i][j][kind] = row;
          row += counts_.n[kind] * rows_at(tiles.stride, tiles.height(kind), i) *
                 rows_at(tiles.stride, tiles.width(kind), j);
        }
      }
    }
    begin_[kPoints][0][0] = row;
  }

  int64_t total_rows() const { return begin_[kPoints][0][0]; }
  // Of the matrix of a pair of points.
  int64_t begin(int i, int j) const { return begin_[i][j][0]; }
  int64_t rows(int i, int j) const {
    return (j + 1 < kPoints ? begin(i, j + 1) : begin(i + 1, 0)) - begin(i, j);
  }
  // The row, from the beginning of all matrices, of the tile that is the `index`th of its kind, before()
  // counted; `turn`: which of the tile's rows.
  int64_t row(int i, int j, int kind, int64_t turn, int64_t index) const {
    return begin_[i][j][kind] + turn * counts_.n[kind] + index - first_.n[kind];
  }

 private:
  Kinds first_, counts_;
  int64_t begin_[kPoints + 1][kPoints][4];
};

// Number of rows of all the matrices together, for all tiles of one image.
inline int64_t rows_of_image(const Tiles& tiles) {
  const int64_t count = tiles.in_image();
  return count == 0 ? 0 : Matrices(tiles, {0, count}).total_rows();
}

// Rows of channels one line apart from a power of two, so that they do not fall into the same set of a cache.
inline int64_t row_stride(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

}  // namespace
}  // namespace fused_res::cpu
