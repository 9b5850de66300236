// The core of every matrix product: how a block of threads shares a tile of sums, adds to it what a stage of
// the pipeline holds, and keeps the next stages' copies under way meanwhile.
#pragma once

#include <cstring>

#include "cuda/shared_tile.cuh"

namespace fused_res::cuda {

// A block's tile of sums, of which every warp has a part.
template <int rows, int cols, int warps_down, int warps_across>
struct TileShape {
  static constexpr int kRows = rows, kCols = cols;
  static constexpr int kWarpRows = rows / warps_down, kWarpCols = cols / warps_across;
  static constexpr int kThreads = kWarp * warps_down * warps_across;

  static __device__ int warp_row() {
    return static_cast<int>(threadIdx.x) / kWarp / warps_across * kWarpRows;
  }
  static __device__ int warp_col() {
    return static_cast<int>(threadIdx.x) / kWarp % warps_across * kWarpCols;
  }
};

using LargeTile = TileShape<128, 128, 2, 4>;
using TallTile = TileShape<128, 64, 2, 2>;
using SmallTile = TileShape<64, 64, 2, 2>;

// The sums as they go through shared memory to the epilogue. The padding has rows eight banks apart.
template <class Shape>
struct SumTile {
  static constexpr int kStride = Shape::kCols + 8;
  static constexpr int kBytes = Shape::kRows * kStride * static_cast<int>(sizeof(float));
};

// A warp's part of the sums on tensor cores. T: bfloat16, float16, or float for TF32.
template <class T, class Shape, class A, class B>
class TensorCores {
 public:
  // Adds the product of a stage's tiles.
  __device__ void add(const unsigned char* a, const unsigned char* b) {
    constexpr int kSteps = 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t rows[kRows][4], cols[kCols][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load<A, true>(rows[i], a, Shape::warp_row() + 16 * i, step);
#pragma unroll
      for (int j = 0; j < kCols; ++j) load<B, false>(cols[j], b, Shape::warp_col() + 16 * j, step);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kCols; ++j) {
          const uint32_t col[2] = {cols[j / 2][j % 2 * 2], cols[j / 2][j % 2 * 2 + 1]};
          ptx::multiply_add<Multiplied>(sums_[i][j], rows[i], col);
        }
      }
    }
  }

  __device__ void store(float* sums) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float* place =
        sums + (Shape::warp_row() + lane / 4) * SumTile<Shape>::kStride + Shape::warp_col() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kCols; ++j) {
        const float* pair = sums_[i / 2][j] + i % 2 * 2;
        *reinterpret_cast<float2*>(place + i * 8 * SumTile<Shape>::kStride + j * 8) =
            make_float2(pair[0], pair[1]);
      }
    }
  }

 private:
  static constexpr bool kTf32 = std::is_same_v<T, float>;
  using Multiplied = std::conditional_t<kTf32, uint32_t, T>;
  // Fragments of 16 rows or columns each.
  static constexpr int kRows = Shape::kWarpRows / 16, kCols = Shape::kWarpCols / 16;

  // Four matrices of 8 rows by 16 bytes of depth: two of rows by two of depth, those that differ in the rows
  // next to each other where `rows_first`. An 8x8 matrix of 16-bit elements is 8x4 of 32 bits.
  template <class Operand, bool rows_first>
  static __device__ void load(uint32_t (&fragment)[4], const unsigned char* tile, int row, int step) {
    using Tile = typename Operand::Tile;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto row_half = [](int matrix) { return rows_first ? matrix % 2 : matrix / 2; };
    const auto depth_half = [](int matrix) { return rows_first ? matrix / 2 : matrix % 2; };
    const int matrix = lane / 8;  // whose address this lane brings
    if constexpr (Operand::kDepthAlongLines) {
      const int place = Tile::at(row + 8 * row_half(matrix) + lane % 8, 2 * step + depth_half(matrix));
      ptx::load_matrices(fragment, shared_address(tile) + place);
    } else if constexpr (!kTf32) {
      const int place = Tile::at(16 * step + 8 * depth_half(matrix) + lane % 8, row / 8 + row_half(matrix));
      ptx::load_matrices_transposed(fragment, shared_address(tile) + place);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int its_row = row + 8 * row_half(i) + lane / 4;
        const int place = Tile::at(8 * step + 4 * depth_half(i) + lane % 4, its_row / 4);
        fragment[i] = reinterpret_cast<const uint32_t*>(tile + place)[its_row % 4];
      }
    }
    if constexpr (kTf32) {
#pragma unroll
      for (uint32_t& element : fragment) {
        float x;
        memcpy(&x, &element, sizeof(x));
        element = ptx::to_tf32(x);
      }
    }
  }

  float sums_[kRows][2 * kCols][4] = {};
};

// The same in exact float32, one product at a time. A lane has every eighth row and every fourth column.
template <class Shape, class A, class B>
class CudaCores {
 public:
  __device__ void add(const unsigned char* a, const unsigned char* b) {
#pragma unroll 1
    for (int step = 0; step < kDepth<float> / 4; ++step) {
      float rows[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load<A>(rows[i], a, first_row() + 8 * i, step);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        float col[4];
        load<B>(col, b, first_col() + 4 * j, step);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums_[i][j] = fmaf(rows[i][k], col[k], sums_[i][j]);
        }
      }
    }
  }

  __device__ void store(float* sums) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        sums[(first_row() + 8 * i) * SumTile<Shape>::kStride + first_col() + 4 * j] = sums_[i][j];
      }
    }
  }

 private:
  static constexpr int kRows = Shape::kWarpRows / 8, kCols = Shape::kWarpCols / 4;

  static __device__ int first_row() { return Shape::warp_row() + static_cast<int>(threadIdx.x) % kWarp / 4; }
  static __device__ int first_col() { return Shape::warp_col() + static_cast<int>(threadIdx.x) % 4; }

  // Four elements of a row, along the depth.
  template <class Operand>
  static __device__ void load(float (&elements)[4], const unsigned char* tile, int row, int step) {
    using Tile = typename Operand::Tile;
    if constexpr (Operand::kDepthAlongLines) {
      const float4 chunk = *reinterpret_cast<const float4*>(tile + Tile::at(row, step));
      elements[0] = chunk.x, elements[1] = chunk.y, elements[2] = chunk.z, elements[3] = chunk.w;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        elements[k] = reinterpret_cast<const float*>(tile + Tile::at(4 * step + k, row / 4))[row % 4];
      }
    }
  }

  float sums_[kRows][kCols] = {};
};

template <class T, bool exact, class Shape, class A, class B>
using Product = std::conditional_t<exact, CudaCores<Shape, A, B>, TensorCores<T, Shape, A, B>>;

// Blocks that a multiprocessor shall have room for: 128 registers a thread, or 168 where sums are exact or
// operands are formed (but for the largest tile, of which there would be one).
template <class Shape, bool exact, bool formed>
constexpr int kResidentBlocks = ((exact || formed ? 384 : 512) + Shape::kThreads - 1) / Shape::kThreads;

constexpr int kStages = 3;

// Adds up `steps` stages. The source copies each into shared memory (`copy`, called once for every stage in
// order), and where an operand is computed from what was copied, forms it there: every thread from what it
// has copied itself, before the others look (`form`). Behind it, shared memory is free for other use.
template <class Product, class Source>
__device__ void accumulate(Product& product, Source& source, int steps) {
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) source.copy(stage);
    ptx::copy_async_commit();
  }
  int stage = 0, free = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<kStages - 2>();
    source.form(stage);
    __syncthreads();
    // All have read the stage before this one.
    if (step + kStages - 1 < steps) source.copy(free);
    ptx::copy_async_commit();
    product.add(source.a(stage), source.b(stage));
    free = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::copy_async_wait<0>();
  __syncthreads();
}

}  // namespace fused_res::cuda
