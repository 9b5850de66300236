// How Winograd cuts images into tiles, and where a tile's factors lie. The last tiles of a row or a column
// may be smaller than the others; then they lack some points of interpolation, and the matrices of these have
// fewer rows.
#pragma once

#include "cpu/isa/kernels.h"

namespace fused_res::cpu {
namespace {

// Numbers for each kind of tile: bit 1 of the index is set for the last row of tiles, bit 0 for the last
// column, if these are smaller.
struct Kinds {
  int64_t n[4];
};

struct Tiles {
  int64_t tile;            // outputs a side
  int64_t across, down;    // tiles
  int64_t edge_w, edge_h;  // outputs in the last tile, 0 if it is like the others

  Tiles(int64_t size, int64_t out_height, int64_t out_width)
      : tile(size),
        across((out_width + size - 1) / size),
        down((out_height + size - 1) / size),
        edge_w(edge(out_width)),
        edge_h(edge(out_height)) {}

  int64_t in_image() const { return across * down; }
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

// The matrices of a block of tiles, one for each pair of points, with the rows of all the tiles that have it.
class Matrices {
 public:
  Matrices(const Tiles& tiles, Range block) : tiles_(tiles), first_(tiles.before(block.begin)) {
    const Kinds end = tiles.before(block.end);
    for (int kind = 0; kind < 4; ++kind) counts_.n[kind] = end.n[kind] - first_.n[kind];
    for (int lacks = 0; lacks < 4; ++lacks) {
      rows_[lacks] = 0;
      for (int kind = 0; kind < 4; ++kind) {
        row_[lacks][kind] = rows_[lacks];
        if ((lacks & kind) == 0) rows_[lacks] += counts_.n[kind];
      }
    }
    int64_t row = 0;
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        begin_[i][j] = row;
        row += rows(i, j);
      }
    }
    total_ = row;
  }

  int64_t total_rows() const { return total_; }
  // Of the matrix of a pair of points.
  int64_t begin(int i, int j) const { return begin_[i][j]; }
  int64_t rows(int i, int j) const {
    return has(tiles_.tile, i) && has(tiles_.tile, j) ? rows_[lacking(i, j)] : 0;
  }
  // The row, from the beginning of all matrices, of the tile that is the `index`th of its kind, before()
  // counted.
  int64_t row(int i, int j, int kind, int64_t index) const {
    return begin_[i][j] + row_[lacking(i, j)][kind] + index - first_.n[kind];
  }

 private:
  // Whether F(m) has this point: see winograd_points.h.
  static bool has(int64_t m, int point) { return point < m + 1 || point == 5; }
  int lacking(int i, int j) const {
    const bool lacks_i = tiles_.edge_h != 0 && !has(tiles_.edge_h, i);
    const bool lacks_j = tiles_.edge_w != 0 && !has(tiles_.edge_w, j);
    return lacks_i * 2 + lacks_j;
  }

  Tiles tiles_;
  Kinds first_, counts_;
  int64_t rows_[4];    // by which kinds lack the point
  int64_t row_[4][4];  // the first row of each kind
  int64_t begin_[6][6];
  int64_t total_;
};

// Rows of channels one line apart from a power of two, so that they do not fall into the same set of a cache.
inline int64_t row_stride(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

}  // namespace
}  // namespace fused_res::cpu
