// GEMM operand tiles in shared memory: lines of 16-byte chunks. The chunks of a line are XOR-swizzled so that
// neither writing a line nor reading a column of chunks (ldmatrix) causes bank conflicts.
#pragma once

#include <type_traits>

#include "cuda/elementwise.cuh"
#include "cuda/gemm_partition.h"
#include "cuda/ptx.cuh"

namespace fused_res::cuda {

constexpr int kChunkBytes = 16;

// Elements of one pipeline stage along K.
template <class T>
constexpr int kTileK = kTileKBytes / static_cast<int>(sizeof(T));

template <int lines, int chunks>
struct SharedTile {
  static constexpr int kLines = lines;
  static constexpr int kChunks = chunks;
  static constexpr int kBytes = lines * chunks * kChunkBytes;

  // Return the swizzled byte offset of a chunk. In eight lines that begin at a multiple of eight, the same
  // chunk lies in eight different groups of four banks, which is what one ldmatrix phase reads. In long lines
  // the first four of these lines are also two groups apart, for fragments of 32-bit elements that are read
  // transposed.
  static __device__ int byte_offset(int line, int chunk) {
    if constexpr (chunks == 4) return (line * chunks + (chunk ^ ((line >> 1) & 3))) * kChunkBytes;
    return (line * chunks + (chunk ^ ((line & 3) << 1 | ((line >> 2) & 1)))) * kChunkBytes;
  }
  static_assert(chunks == 4 || chunks % 8 == 0);
};

// Assignment of a tile's chunks to the threads that copy them (CUTLASS ThreadMap): a thread copies the same
// chunk of every kLines-th line.
template <class Tile, class Shape>
struct TileThreadMap {
  static constexpr int kLines = Shape::kThreads / Tile::kChunks, kIterations = Tile::kLines / kLines;
  static_assert(kLines * Tile::kChunks == Shape::kThreads && kIterations * kLines == Tile::kLines);

  static __device__ int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }
  static __device__ int line(int i) { return static_cast<int>(threadIdx.x) / Tile::kChunks + i * kLines; }
  static __device__ int byte_offset(int i) { return Tile::byte_offset(line(i), chunk()); }
};

// Copy a chunk to shared memory. The first `valid_elements` elements are inside the tensor; the others become
// zeros. `aligned`: one asynchronous 16-byte copy, where either all elements of the chunk are valid or none.
template <bool aligned, class T>
__device__ void copy_chunk(unsigned char* dst, const T* tensor, int64_t offset, int64_t valid_elements) {
  if constexpr (aligned) {
    ptx::cp_async(shared_address(dst), tensor + (valid_elements > 0 ? offset : 0), valid_elements > 0);
  } else {
    Vector<T, kVector<T>> chunk;
    for (int i = 0; i < kVector<T>; ++i)
      chunk[i] = i < valid_elements ? tensor[offset + i] : from_float<T>(0);
    store(reinterpret_cast<T*>(dst), chunk);
  }
}

// Tile of one GEMM operand: `rows` rows of A (columns of B), each kTileK elements along K. `k_major`: K is
// contiguous in memory and runs along a line of the tile; otherwise the rows are.
template <class T, int rows, bool k_major>
struct GemmOperand {
  using Element = T;
  static constexpr bool kKMajor = k_major;
  using Tile = std::conditional_t<k_major, SharedTile<rows, kTileKBytes / kChunkBytes>,
                                  SharedTile<kTileK<T>, rows* static_cast<int>(sizeof(T)) / kChunkBytes>>;
};

}  // namespace fused_res::cuda
