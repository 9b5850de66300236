// Winograd convolution: the grid of output tiles, and the row layout of the transform-domain matrices V
// (transformed input) and M (their product with the transformed filter U). The last tiles of a row or a
// column may be smaller than F(m); a smaller tile uses fewer interpolation points, so the matrices of the
// unused points have fewer rows.
#pragma once

#include "cpu/isa/kernels.h"

namespace fused_res::cpu {
namespace {

constexpr int kTaps = 3;                             // r of F(m, r)
constexpr int kPoints = 6;                           // transform points in one dimension
constexpr int kTransformPoints = kPoints * kPoints;  // (i, j) in two dimensions: one GEMM each

// The elements of a transformed tile, in one dimension (winograd_points.h). F(m) has alpha(stride, m) of
// them: element l belongs to interpolation point l for l < num_points(); with stride 2, the elements after
// these are the inputs of the filter's middle tap, which all share the transform point kMiddleTap.
constexpr int kMiddleTap = kPoints - 2, kInfinity = kPoints - 1;
constexpr int alpha(int stride, int m) { return (m - 1) * stride + kTaps; }  // also the input tile's side
constexpr int kMaxTransformElements = alpha(2, 4) * alpha(2, 4);
constexpr int num_points(int stride, int m) { return stride == 1 ? m + 2 : m + 1; }
// The transform point of element l.
constexpr int point_index(int stride, int m, int l) {
  const int points = num_points(stride, m);
  return l < points - 1 ? l : l == points - 1 ? kInfinity : kMiddleTap;
}
// The index of element l among the elements of a tile that share its transform point.
constexpr int row_in_tile(int stride, int m, int l) {
  return l < num_points(stride, m) ? 0 : l - num_points(stride, m);
}
// The number of elements of an F(m) tile at this transform point, each of which is a row of the GEMM.
constexpr int64_t rows_per_tile(int64_t stride, int64_t m, int point) {
  if (stride == 2 && point == kMiddleTap) return m;
  return point == kInfinity || point < num_points(static_cast<int>(stride), static_cast<int>(m)) - 1;
}

// A number of tiles for each tile class: interior (0), right edge (1), bottom edge (2), corner (3). Bit 0 of
// the class is set in the last column of tiles and bit 1 in the last row, if the tiles there are smaller.
struct TileClassCounts {
  int64_t n[4];
};

struct TileGrid {
  int64_t stride;            // of the convolution
  int64_t tile;              // output tile size m
  int64_t tiles_w, tiles_h;  // tiles per row and per column of an image
  int64_t edge_w, edge_h;    // output size of the last tile, 0 if it is m

  TileGrid(int64_t conv_stride, int64_t tile_size, int64_t out_height, int64_t out_width)
      : stride(conv_stride),
        tile(tile_size),
        tiles_w((out_width + tile_size - 1) / tile_size),
        tiles_h((out_height + tile_size - 1) / tile_size),
        edge_w(edge(out_width)),
        edge_h(edge(out_height)) {}
  explicit TileGrid(const ConvolutionArgs& args)
      : TileGrid(args.stride_h, args.tile, args.out_height, args.out_width) {}

  int64_t per_image() const { return tiles_w * tiles_h; }
  int64_t transform_elements() const {  // alpha^2 of an interior tile
    const int side = alpha(static_cast<int>(stride), static_cast<int>(tile));
    return side * side;
  }
  // The output size of a tile. Where the image ends within a tile, the surplus outputs are cropped.
  int64_t height(int tile_class) const { return tile_class & 2 ? edge_h : tile; }
  int64_t width(int tile_class) const { return tile_class & 1 ? edge_w : tile; }
  int tile_class(int64_t y, int64_t x) const {
    return (edge_h != 0 && y == tiles_h - 1) * 2 + (edge_w != 0 && x == tiles_w - 1);
  }

  // The number of tiles of each class before tile `index`, counted through all images.
  TileClassCounts count_before(int64_t index) const {
    const int64_t image = index / per_image(), y = index % per_image() / tiles_w, x = index % tiles_w;
    const int64_t rows = tiles_h - (edge_h != 0), columns = tiles_w - (edge_w != 0);
    const int64_t whole = y < rows ? y : rows;        // complete rows of interior tiles in this image
    const int64_t first = x < columns ? x : columns;  // interior tiles in the incomplete row
    TileClassCounts k = {{image * rows * columns + whole * columns,
                          image * rows * (tiles_w - columns) + whole * (tiles_w - columns),
                          image * (tiles_h - rows) * columns,
                          image * (tiles_h - rows) * (tiles_w - columns)}};
    const int row = y < rows ? 0 : 2;
    k.n[row] += first;
    k.n[row + 1] += x - first;
    return k;
  }

 private:
  int64_t edge(int64_t size) const {
    const int64_t rest = size % tile;
    // A rest of 1 is computed by F(2) with one output cropped.
    return tile == 2 || rest == 0 ? 0 : rest == 1 ? 2 : rest;
  }
};

// The row layout of V and M for a block of tiles: one matrix for each transform point (i, j), matrix after
// matrix. A matrix has the rows of all tiles that use its point, grouped by tile class. Where a tile has
// several rows at a point (stride 2), row 0 of all tiles of the class comes first, then row 1, and so on.
class TransformLayout {
 public:
  TransformLayout(const TileGrid& tiles, Range block) : first_(tiles.count_before(block.begin)) {
    const TileClassCounts end = tiles.count_before(block.end);
    for (int tile_class = 0; tile_class < 4; ++tile_class)
      counts_.n[tile_class] = end.n[tile_class] - first_.n[tile_class];
    int64_t row = 0;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        for (int tile_class = 0; tile_class < 4; ++tile_class) {
          begin_[i][j][tile_class] = row;
          row += counts_.n[tile_class] * rows_per_tile(tiles.stride, tiles.height(tile_class), i) *
                 rows_per_tile(tiles.stride, tiles.width(tile_class), j);
        }
      }
    }
    begin_[kPoints][0][0] = row;
  }

  int64_t total_rows() const { return begin_[kPoints][0][0]; }
  // The first row and the number of rows of the matrix of transform point (i, j).
  int64_t begin(int i, int j) const { return begin_[i][j][0]; }
  int64_t rows(int i, int j) const {
    return (j + 1 < kPoints ? begin(i, j + 1) : begin(i + 1, 0)) - begin(i, j);
  }
  // The row, counted through all matrices, of a tile at transform point (i, j). `index`: position of the tile
  // within its class, as count_before() counts. `tile_row`: which of the tile's rows at this point.
  int64_t row(int i, int j, int tile_class, int64_t tile_row, int64_t index) const {
    return begin_[i][j][tile_class] + tile_row * counts_.n[tile_class] + index - first_.n[tile_class];
  }

 private:
  TileClassCounts first_, counts_;
  int64_t begin_[kPoints + 1][kPoints][4];
};

// The number of rows of all transform-domain GEMMs together, for one image.
inline int64_t gemm_rows_per_image(const TileGrid& tiles) {
  const int64_t count = tiles.per_image();
  return count == 0 ? 0 : TransformLayout(tiles, {0, count}).total_rows();
}

inline int dtype_index(const ConvolutionArgs& args) { return static_cast<int>(args.dtype); }

// K of the im2col GEMM: the elements of an output pixel's receptive field.
inline int64_t gemm_k(const ConvolutionArgs& args) { return args.kernel_h * args.kernel_w * args.channels; }

// The leading dimension of a matrix with this many columns: one cache line more than a multiple of a line, so
// that rows a power of two apart do not alias in the same cache set.
inline int64_t padded_row_stride(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

constexpr int64_t kMaxDirectRows = 56;  // output pixels of a direct convolution's chunk

// The direct weight gradient packs A^T in blocks of nearly equal height, up to kWgradRows elements of the
// receptive field, so that a pixel's elements lie in one cache line.
constexpr int64_t kWgradRows = 14, kWgradLine = 16;
constexpr int64_t kCopiedRows = 8;  // im2col rows that are copied at a time before they are packed
inline int64_t wgrad_row_blocks(int64_t k) { return (k + kWgradRows - 1) / kWgradRows; }
inline Range wgrad_row_block(int64_t k, int64_t block) {
  const int64_t blocks = wgrad_row_blocks(k);
  return {k * block / blocks, k * (block + 1) / blocks};
}
// Floats of a block: a line more than its rows fill, so that the blocks do not alias in the L1.
inline int64_t wgrad_row_block_floats(int64_t pixels) { return (pixels + 1) * kWgradLine; }

}  // namespace
}  // namespace fused_res::cpu
